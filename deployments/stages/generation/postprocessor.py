"""Stage 4 for language models: tokens to text, for all requests of a step at once."""

from __future__ import annotations

import time

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.generation.text import detokenize
from deployments.engine.tokenizers import keep_torch_out, load_text_tokenizer
from deployments.messages import Detokenized, DetokenizeRequest, Envelope, Reply
from deployments.stages.channel_stage import EventLoopStage
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PostprocessRecord


class DetokenizerStage(EventLoopStage):
    """Keeps nothing between calls: what a text needs to be continued comes with its next tokens, so that any replica
    can continue it."""

    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        card = ModelCard.load(config.model)
        if placement.is_own_process:
            keep_torch_out(config.model)
        self._tokenizer = load_text_tokenizer(config.model, card)
        self._meter = EventLoopMeter(started_s)
        telemetry = Telemetry("postprocessor", config, card.name, placement.identity)
        self._serve(
            lambda envelope, request, _: self.detokenize(envelope, request),
            DetokenizeRequest,
            config,
            placement,
            telemetry,
        )

    def detokenize(self, envelope: Envelope, request: DetokenizeRequest) -> Reply[Detokenized]:
        result: Detokenized | None = None
        record = PostprocessRecord(envelope)
        with self._meter.requests(len(request.items)), self._telemetry.stage(record):
            result = Detokenized(tuple(detokenize(item, self._tokenizer) for item in request.items))
            record.output_length = sum(len(item.text) for item in result.items)
        return record.reply(result)

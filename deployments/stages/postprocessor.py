"""Stage 4: model output to the parts of the response."""

from __future__ import annotations

import time

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.outputs.predictions import PredictionBuilder
from deployments.engine.tokenizers import keep_torch_out, load_pretrained_tokenizer
from deployments.messages import Envelope, Postprocessed, PostprocessRequest
from deployments.stages.channel_stage import EventLoopStage, Handled
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PostprocessRecord


class PostprocessorStage(EventLoopStage):
    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        card = ModelCard.load(config.model)
        predicts_words = card.task in ("token-classification", "fill-mask")
        if placement.is_own_process:
            keep_torch_out(config.model)
        pretrained = load_pretrained_tokenizer(config.model, card) if predicts_words else None
        # Decoding a sequence for each candidate would hold up the replica's other requests.
        self._takes_long = card.task == "fill-mask"
        self._predictions = PredictionBuilder(card, pretrained)
        self._meter = EventLoopMeter(started_s)
        telemetry = Telemetry("postprocessor", config, card.name, placement.identity)
        self._serve(
            lambda envelope, request, _: self.postprocess(envelope, request),
            PostprocessRequest,
            config,
            placement,
            telemetry,
        )

    def postprocess(self, envelope: Envelope, request: PostprocessRequest) -> Handled[Postprocessed]:
        """Reply at once if that is quick, else from a thread."""
        record = PostprocessRecord(envelope)
        return self._handle(
            record,
            lambda: self._postprocessed(request, record),
            lambda made: made,
            takes_long=self._takes_long,
        )

    def _postprocessed(self, request: PostprocessRequest, record: PostprocessRecord) -> Postprocessed:
        built = self._predictions.build(request.tokenized, request.outputs, request.options, request.texts)
        record.output_length = sum(map(len, built.fragments)) + sum(len(one.data) for one in built.tensors)
        return built

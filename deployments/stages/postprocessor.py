"""Stage 4: model output to JSON predictions."""

from __future__ import annotations

import asyncio
import time

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.predictions import PredictionBuilder
from deployments.engine.tokenizers import load_pretrained_tokenizer
from deployments.messages import Call, Postprocessed, PostprocessRequest, Reply
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PostprocessRecord


class PostprocessorStage:
    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        card = ModelCard.load(config.model)
        predicts_words = card.task in ("token-classification", "fill-mask")
        pretrained = load_pretrained_tokenizer(config.model, card) if predicts_words else None
        # Decoding a sequence for each candidate would hold up the replica's other requests.
        self._takes_long = card.task == "fill-mask"
        self._predictions = PredictionBuilder(card, pretrained)
        self._telemetry = Telemetry("postprocessor", config, card.name, placement.identity)
        self._meter = EventLoopMeter(started_s)

    async def postprocess(self, calls: tuple[Call[PostprocessRequest], ...]) -> tuple[Reply[Postprocessed], ...]:
        with self._meter.requests(len(calls)):
            if not self._takes_long:
                return self._postprocess(calls)
            with self._meter.in_thread():
                return await asyncio.to_thread(self._postprocess, calls)

    def _postprocess(self, calls: tuple[Call[PostprocessRequest], ...]) -> tuple[Reply[Postprocessed], ...]:
        records = [PostprocessRecord(call.envelope) for call in calls]
        results: list[Postprocessed | None] = [None] * len(calls)
        with self._telemetry.stages(records):
            for i, (call, record) in enumerate(zip(calls, records, strict=True)):
                with self._telemetry.part(record):
                    request = call.request
                    fragments = self._predictions.fragments(
                        request.tokenized, request.outputs, request.options, request.texts
                    )
                    record.output_length = sum(map(len, fragments))
                    results[i] = Postprocessed(fragments)
        return tuple(record.reply(result) for record, result in zip(records, results, strict=True))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report().stats()

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()

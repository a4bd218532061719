"""Stage 4: model output to the JSON of the answer."""

from __future__ import annotations

import asyncio
import time

from deployments.autoscaling.meters import LoopLoad
from deployments.config import AppConfig
from deployments.engine.answers import AnswerBuilder
from deployments.engine.card import ModelCard
from deployments.engine.tokenizers import load_pretrained_tokenizer
from deployments.messages import Answer, PostprocessRequest, Reply
from deployments.stages.replica import placement
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PostprocessRecord


class PostprocessorStage:
    def __init__(self, config: AppConfig) -> None:
        started_s = time.monotonic()
        card = ModelCard.load(config.model)
        answers_in_words = card.task in ("token-classification", "fill-mask")
        pretrained = load_pretrained_tokenizer(config.model, card) if answers_in_words else None
        # Decoding a sequence for each candidate would hold up the replica's other requests.
        self._takes_long = card.task == "fill-mask"
        self._answers = AnswerBuilder(card, pretrained)
        self._telemetry = Telemetry("postprocessor", config, card.name, placement().identity)
        self._load = LoopLoad(started_s)

    async def postprocess(self, requests: tuple[PostprocessRequest, ...]) -> tuple[Reply[Answer], ...]:
        with self._load.requests(len(requests)):
            if not self._takes_long:
                return self._postprocess(requests)
            with self._load.in_thread():
                return await asyncio.to_thread(self._postprocess, requests)

    def _postprocess(self, requests: tuple[PostprocessRequest, ...]) -> tuple[Reply[Answer], ...]:
        records = [PostprocessRecord(request.envelope) for request in requests]
        answers: list[Answer | None] = [None] * len(requests)
        with self._telemetry.stages(records):
            for i, (request, record) in enumerate(zip(requests, records, strict=True)):
                with self._telemetry.part(record):
                    fragments = self._answers.fragments(
                        request.tokenized, request.outputs, request.options, request.texts
                    )
                    record.output_length = sum(map(len, fragments))
                    answers[i] = Answer(fragments)
        return tuple(record.reply(answer) for record, answer in zip(records, answers, strict=True))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the autoscaling policy."""
        return self._load.load().stats()

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()

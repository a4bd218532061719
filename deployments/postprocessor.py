"""Stage 4: model output to the JSON of the answer."""

from __future__ import annotations

import asyncio

from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.tasks import AnswerBuilder
from deployments.engine.tokenizers import load_pretrained_tokenizer
from deployments.messages import Answer, PostprocessRequest, Reply
from deployments.replica import placement
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PostprocessRecord


class PostprocessorStage:
    def __init__(self, config: AppConfig) -> None:
        card = ModelCard.load(config.model)
        answers_in_words = card.task in ("token-classification", "fill-mask")
        pretrained = load_pretrained_tokenizer(config.model, card) if answers_in_words else None
        # Decoding a sequence for each candidate would hold up the replica's other requests.
        self._takes_long = card.task == "fill-mask"
        self._answers = AnswerBuilder(card, pretrained)
        self._telemetry = Telemetry("postprocessor", config, card.name, placement().identity)

    async def postprocess(self, requests: tuple[PostprocessRequest, ...]) -> tuple[Reply[Answer], ...]:
        if self._takes_long:
            return await asyncio.to_thread(self._postprocess, requests)
        return self._postprocess(requests)

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

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()

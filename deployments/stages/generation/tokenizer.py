"""Stage 2 for language models: a conversation or a prompt to token ids."""

from __future__ import annotations

import time

import numpy as np

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.tokenizers import TemplateError, keep_torch_out, load_text_tokenizer
from deployments.errors import InvalidField
from deployments.messages import Envelope, Ids, Ragged, RenderRequest, Tokenized
from deployments.stages.channel_stage import EventLoopStage, Handled
from deployments.stages.replica import Placement, prepare_replica
from deployments.stages.tokenizer import INLINE_CHARS
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import TokenizeRecord


class PromptTokenizerStage(EventLoopStage):
    """Applies the chat template and tokenizes."""

    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        self._config = config
        self._card = ModelCard.load(config.model)
        if placement.is_own_process:
            keep_torch_out(config.model)
        self._tokenizer = load_text_tokenizer(config.model, self._card)
        self._meter = EventLoopMeter(started_s)
        telemetry = Telemetry("tokenizer", config, self._card.name, placement.identity)
        self._serve(
            lambda envelope, request, _: self.render(envelope, request), RenderRequest, config, placement, telemetry
        )

    def render(self, envelope: Envelope, request: RenderRequest) -> Handled[Tokenized]:
        """Reply at once if that is quick, else from a thread."""
        record = TokenizeRecord(envelope, slow_ms=self._config.tokenizer.slow_ms)
        record.input_chars = sum(len(one.content) for one in request.messages) + len(request.text or "")
        return self._handle(
            record,
            lambda: self._ids(request),
            lambda ids: self._checked(ids, request, record),
            takes_long=record.input_chars > INLINE_CHARS,
        )

    def _ids(self, request: RenderRequest) -> Ids:
        if request.messages:
            try:
                return self._tokenizer.render(request.messages)
            except TemplateError as error:
                raise InvalidField(str(error), param=request.param) from None
        if request.text is not None:
            return self._tokenizer.encode(request.text)
        return np.array(request.ids, dtype=np.int32)

    def _checked(self, ids: Ids, request: RenderRequest, record: TokenizeRecord) -> Tokenized:
        """Reject prompts that the model cannot take."""
        param, longest = request.param, self._card.max_length
        if not len(ids):
            raise InvalidField(f"{param} has no tokens", param=param)
        unknown = ids[(ids < 0) | (ids >= self._card.vocab_size)]
        if len(unknown):
            raise InvalidField(
                f"{param} contains a token that the model does not know (id {unknown[0]})",
                param=param,
            )
        if len(ids) >= longest:
            raise InvalidField(
                f"{param} is {len(ids)} tokens long; the model takes {longest}, its output included", param=param
            )
        record.token_count = len(ids)
        return Tokenized(Ragged.of([ids]), (False,))

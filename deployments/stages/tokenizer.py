"""Stage 2: text to token ids."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.protocol import MAX_MASKS, Encoded
from deployments.engine.tokenizers import load_tokenizer
from deployments.errors import InvalidField
from deployments.messages import Call, Ragged, Reply, Tokenized, TokenizeRequest
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import TokenizeRecord

_INLINE_CHARS = 4_000
"""Up to this size, tokenizing costs less than handing it to a thread; beyond it, it would block other requests."""


class TokenizerStage:
    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        self._config = config
        self._card = ModelCard.load(config.model)
        self._tokenizer = load_tokenizer(config.model, self._card)
        self._with_offsets = self._card.task == "token-classification"
        self._cache = _Cache(config.tokenizer.cache_entries, config.tokenizer.cache_max_chars)
        self._telemetry = Telemetry("tokenizer", config, self._card.name, placement.identity)
        self._meter = EventLoopMeter(started_s)

    async def tokenize(self, calls: tuple[Call[TokenizeRequest], ...]) -> tuple[Reply[Tokenized], ...]:
        slow_ms = self._config.tokenizer.slow_ms
        records = [TokenizeRecord(call.envelope, slow_ms=slow_ms) for call in calls]
        requests = [call.request for call in calls]
        results: list[Tokenized | None] = [None] * len(requests)
        with self._meter.requests(len(requests)), self._telemetry.stages(records):
            texts = [text for request in requests for text in _texts(request)]
            cached = {text: encoded for text in texts if (encoded := self._cache.get(text)) is not None}
            made = await self._encode_together([text for text in texts if text not in cached])
            for i, (request, record) in enumerate(zip(requests, records, strict=True)):
                with self._telemetry.part(record):
                    results[i] = self._tokenized(request, record, cached, made)
        return tuple(record.reply(result) for record, result in zip(records, results, strict=True))

    async def _encode_together(self, texts: Sequence[str]) -> dict[str, Encoded]:
        """Encode all in one tokenizer call. Empty if one of them makes it raise: each request then encodes its own."""
        if not texts:
            return {}
        try:
            if sum(map(len, texts)) <= _INLINE_CHARS:
                made = self._tokenizer.encode(texts, with_offsets=self._with_offsets)
            else:
                with self._meter.in_thread():
                    made = await asyncio.to_thread(self._tokenizer.encode, texts, with_offsets=self._with_offsets)
        except Exception:
            return {}
        for text, encoded in zip(texts, made, strict=True):
            self._cache.put(text, encoded)
        return dict(zip(texts, made, strict=True))

    def _tokenized(
        self,
        request: TokenizeRequest,
        record: TokenizeRecord,
        cached: Mapping[str, Encoded],
        made: Mapping[str, Encoded],
    ) -> Tokenized:
        texts = _texts(request)
        record.input_chars = sum(map(len, texts))
        record.cache_hits = sum(text in cached for text in texts)
        if texts:
            encoded = [cached.get(text) or made.get(text) or self._encode_alone(text) for text in texts]
        else:
            encoded = [self._check_ids(value, i, request.param) for i, value in enumerate(request.inputs)]  # type: ignore[arg-type]
        encoded = [self._truncate(value, i, request) for i, value in enumerate(encoded)]
        result = _result(encoded, with_offsets=self._with_offsets)
        record.token_count = sum(result.ids.lengths)
        record.was_truncated = any(result.truncated)
        return result

    def _encode_alone(self, text: str) -> Encoded:
        return self._tokenizer.encode([text], with_offsets=self._with_offsets)[0]

    def _check_ids(self, ids: Sequence[int], index: int, param: str) -> Encoded:
        """Check token ids supplied by the caller: used as they are if all are in the model's vocabulary."""
        array = np.array(ids, dtype=np.int64)
        wrong = np.flatnonzero((array < 0) | (array >= self._card.vocab_size))
        if wrong.size:
            raise InvalidField(
                f"{param}[{index}][{wrong[0]}] must be a token id from 0 to {self._card.vocab_size - 1}; "
                f"got {ids[int(wrong[0])]}",
                param=param,
            )
        return Encoded(array.astype(np.int32), len(array))

    def _truncate(self, encoded: Encoded, index: int, request: TokenizeRequest) -> Encoded:
        """Reject inputs that the model cannot take, and truncate token ids (texts are already truncated)."""
        longest = self._card.max_length
        if encoded.full_length == 0:
            raise InvalidField(f"{request.param}[{index}] has no tokens", param=request.param)
        if encoded.ids.max() >= self._card.vocab_size:
            # A token that was added to the tokenizer but not to the model; on a GPU it would make the device unusable.
            raise InvalidField(
                f"{request.param}[{index}] contains a token that the model does not know (id {encoded.ids.max()})",
                param=request.param,
            )
        if encoded.full_length > longest and not request.truncate:
            raise InvalidField(
                f"{request.param}[{index}] is {encoded.full_length} tokens long; the model takes at most {longest}, "
                "and truncate is false",
                param=request.param,
            )
        if len(encoded.ids) > longest:
            encoded = Encoded(encoded.ids[:longest], encoded.full_length)
        if self._card.task == "fill-mask":
            self._check_masks(encoded, index, request.param)
        return encoded

    def _check_masks(self, encoded: Encoded, index: int, param: str) -> None:
        masks = int((encoded.ids == self._tokenizer.mask_token_id).sum())
        if not 0 < masks <= MAX_MASKS:
            raise InvalidField(
                f"{param}[{index}] must contain the mask token {self._tokenizer.mask_token} 1 to {MAX_MASKS} times "
                f"within its first {self._card.max_length} tokens; got {masks}",
                param=param,
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report().stats()

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()


class _Cache:
    """The most recently used encodings, bounded in number and in the length of each text."""

    def __init__(self, entries: int, max_chars: int) -> None:
        self._entries, self._max_chars = entries, max_chars
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def get(self, text: str) -> Encoded | None:
        encoded = self._kept.get(text)
        if encoded is not None:
            self._kept.move_to_end(text)
        return encoded

    def put(self, text: str, encoded: Encoded) -> None:
        if len(text) > self._max_chars or self._entries == 0:
            return
        self._kept[text] = encoded
        self._kept.move_to_end(text)
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)


def _texts(request: TokenizeRequest) -> list[str]:
    return [value for value in request.inputs if isinstance(value, str)]


def _result(encoded: Sequence[Encoded], *, with_offsets: bool) -> Tokenized:
    return Tokenized(
        ids=Ragged.of([one.ids for one in encoded]),
        truncated=tuple(one.full_length > len(one.ids) for one in encoded),
        offsets=Ragged.of([one.offsets for one in encoded]) if with_offsets else None,
    )

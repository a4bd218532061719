"""Stage 2: text to token ids."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from deployments.config import AppConfig
from deployments.engine.base import MAX_MASKS, Encoded
from deployments.engine.card import ModelCard
from deployments.engine.tokenizers import load_tokenizer
from deployments.errors import InvalidField
from deployments.messages import Ragged, Reply, Tokenized, TokenizeRequest
from deployments.replica import placement
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import TokenizeRecord

_INLINE_CHARS = 4_000
"""Up to here tokenizing costs less than handing it to a thread; beyond, it would hold up the other requests."""


class TokenizerStage:
    def __init__(self, config: AppConfig) -> None:
        self._config = config
        self._card = ModelCard.load(config.model)
        self._tokenizer = load_tokenizer(config.model, self._card)
        self._with_offsets = self._card.task == "token-classification"
        self._cache = _Cache(config.tokenizer.cache_entries, config.tokenizer.cache_max_chars)
        self._telemetry = Telemetry("tokenizer", config, self._card.name, placement().identity)

    async def tokenize(self, requests: tuple[TokenizeRequest, ...]) -> tuple[Reply[Tokenized], ...]:
        return tuple(await asyncio.gather(*map(self._tokenize, requests)))

    async def _tokenize(self, request: TokenizeRequest) -> Reply[Tokenized]:
        result = None
        with self._telemetry.stage(TokenizeRecord(request.envelope, slow_ms=self._config.tokenizer.slow_ms)) as record:
            texts = [value for value in request.inputs if isinstance(value, str)]
            record.input_chars = sum(map(len, texts))
            if texts:
                encoded, record.cache_hits = await self._encode(texts)
            else:
                encoded = [self._check_ids(value, i, request.param) for i, value in enumerate(request.inputs)]  # type: ignore[arg-type]
            encoded = [self._cut(value, i, request) for i, value in enumerate(encoded)]
            result = _result(encoded, with_offsets=self._with_offsets)
            record.token_count = sum(result.ids.lengths)
            record.was_truncated = any(result.truncated)
        return record.reply(result)

    async def _encode(self, texts: list[str]) -> tuple[list[Encoded], int]:
        """The encodings in order, and how many of them were in the cache."""
        found = [self._cache.get(text) for text in texts]
        missing = [text for text, encoded in zip(texts, found, strict=True) if encoded is None]
        hits = len(texts) - len(missing)
        if not missing:
            return [encoded for encoded in found if encoded is not None], hits
        if sum(map(len, missing)) <= _INLINE_CHARS:
            made = self._tokenizer.encode(missing, with_offsets=self._with_offsets)
        else:
            made = await asyncio.to_thread(self._tokenizer.encode, missing, with_offsets=self._with_offsets)
        for text, encoded in zip(missing, made, strict=True):
            self._cache.put(text, encoded)
        rest = iter(made)
        return [encoded if encoded is not None else next(rest) for encoded in found], hits

    def _check_ids(self, ids: Sequence[int], index: int, param: str) -> Encoded:
        """Token ids that the caller made: used as they are, if the model knows them all."""
        array = np.array(ids, dtype=np.int64)
        wrong = np.flatnonzero((array < 0) | (array >= self._card.vocab_size))
        if wrong.size:
            raise InvalidField(
                f"{param}[{index}][{wrong[0]}] must be a token id from 0 to {self._card.vocab_size - 1}; "
                f"got {ids[int(wrong[0])]}",
                param=param,
            )
        return Encoded(array.astype(np.int32), len(array))

    def _cut(self, encoded: Encoded, index: int, request: TokenizeRequest) -> Encoded:
        """Refuse what the model cannot take, and cut token ids that are too long (texts are cut already)."""
        longest = self._card.max_length
        if encoded.full_length == 0:
            raise InvalidField(f"{request.param}[{index}] has no tokens", param=request.param)
        if encoded.ids.max() >= self._card.vocab_size:
            # A token that was added to the tokenizer and not to the model; on a GPU it would break the device.
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
                f"{param}[{index}] must contain the mask token {self._tokenizer.mask_token}, once to {MAX_MASKS} times "
                f"within its first {self._card.max_length} tokens; got {masks}",
                param=param,
            )

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


def _result(encoded: Sequence[Encoded], *, with_offsets: bool) -> Tokenized:
    return Tokenized(
        ids=Ragged.of([one.ids for one in encoded]),
        truncated=tuple(one.full_length > len(one.ids) for one in encoded),
        offsets=Ragged.of([one.offsets for one in encoded]) if with_offsets else None,
    )

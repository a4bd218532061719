"""Stage 2: text to token ids."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.protocol import MAX_MASKS, Encoded, Text
from deployments.engine.tokenizers import keep_torch_out, load_tokenizer
from deployments.errors import InvalidField
from deployments.messages import Envelope, Ids, Ragged, Tokenized, TokenizeRequest
from deployments.stages.channel_stage import EventLoopStage, Handled
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import TokenizeRecord

INLINE_CHARS = 4_000
"""Up to this size, tokenizing costs less than handing it to a thread; beyond it, it would block other requests."""


class TokenizerStage(EventLoopStage):
    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        self._config = config
        self._card = ModelCard.load(config.model)
        if placement.is_own_process:
            keep_torch_out(config.model)
        self._tokenizer = load_tokenizer(config.model, self._card)
        self._with_offsets = self._card.task == "token-classification"
        self._cache = _Cache(config.tokenizer.cache_entries, config.tokenizer.cache_max_chars)
        self._meter = EventLoopMeter(started_s)
        telemetry = Telemetry("tokenizer", config, self._card.name, placement.identity)
        self._serve(
            lambda envelope, request, _: self.tokenize(envelope, request), TokenizeRequest, config, placement, telemetry
        )

    def tokenize(self, envelope: Envelope, request: TokenizeRequest) -> Handled[Tokenized]:
        """Reply at once if that is quick, else from a thread."""
        texts = [value for value in request.inputs if isinstance(value, str)]
        record = TokenizeRecord(envelope, slow_ms=self._config.tokenizer.slow_ms)
        record.input_chars = sum(map(len, texts)) + len(request.query or "") * len(texts)
        if request.describes:
            return self._handle(
                record,
                lambda: self._tokenizer.describe(texts, adds_special_tokens=request.adds_special_tokens),
                lambda made: self._described(made, record),
                takes_long=record.input_chars > INLINE_CHARS,
            )
        keys: list[Text] = [text if request.query is None else (request.query, text) for text in texts]
        cached = {key: encoded for key in keys if (encoded := self._cache.get(request.tenant, key)) is not None}
        new = [key for key in keys if key not in cached]
        record.cache_hits = len(texts) - len(new)
        return self._handle(
            record,
            lambda: self._encode(new),
            lambda made: self._tokenized(request, cached, made, record),
            takes_long=sum(map(_chars, new)) > INLINE_CHARS,
        )

    def _encode(self, texts: Sequence[Text]) -> dict[Text, Encoded]:
        if not texts:
            return {}
        return dict(zip(texts, self._tokenizer.encode(texts, with_offsets=self._with_offsets), strict=True))

    def _tokenized(
        self, request: TokenizeRequest, cached: dict[Text, Encoded], made: dict[Text, Encoded], record: TokenizeRecord
    ) -> Tokenized:
        """Check and truncate the inputs, whose texts were cached or have just been encoded."""
        for text, one in made.items():
            self._cache.put(request.tenant, text, one)
        encoded_texts = cached | made
        encoded = []
        for index, value in enumerate(request.inputs):
            if isinstance(value, str):
                one = encoded_texts[value if request.query is None else (request.query, value)]
            else:
                one = self._check_ids(value, index, request)
            encoded.append(self._truncate(one, index, request))
        result = _result(encoded, with_offsets=self._with_offsets)
        record.token_count = sum(result.ids.lengths)
        record.was_truncated = any(result.truncated)
        return result

    def _described(self, made: Sequence[Encoded], record: TokenizeRecord) -> Tokenized:
        result = _result(made, with_offsets=True)
        record.token_count = sum(result.ids.lengths)
        return Tokenized(result.ids, result.truncated, result.offsets, tuple(one.tokens for one in made))

    def _check_ids(self, ids: Sequence[int], index: int, request: TokenizeRequest) -> Encoded:
        """Check token ids supplied by the caller: used as they are if all are in the model's vocabulary."""
        param = request.param
        array = np.array(ids, dtype=np.int64)
        wrong = np.flatnonzero((array < 0) | (array >= self._card.vocab_size))
        if wrong.size:
            raise InvalidField(
                f"{param}[{index}][{wrong[0]}] must be a token id from 0 to {self._card.vocab_size - 1}; "
                f"got {ids[int(wrong[0])]}",
                param=param,
            )
        own: Ids = array.astype(np.int32)
        if request.types:
            own = np.stack([own, np.array(request.types[index], dtype=np.int32)], axis=1)
        if not self._with_offsets:
            return Encoded(own, len(own))
        special = self._tokenizer.special_ids
        return Encoded(own, len(own), [(-1, -1) if one in special else (-2, -2) for one in ids])

    def _truncate(self, encoded: Encoded, index: int, request: TokenizeRequest) -> Encoded:
        """Reject inputs that the model cannot take, and truncate token ids (texts are already truncated)."""
        longest = self._card.max_length
        if encoded.full_length == 0:
            raise InvalidField(f"{request.param}[{index}] has no tokens", param=request.param)
        highest = (encoded.ids if encoded.ids.ndim == 1 else encoded.ids[:, 0]).max()
        if highest >= self._card.vocab_size:
            # A token that was added to the tokenizer but not to the model; on a GPU it would make the device unusable.
            raise InvalidField(
                f"{request.param}[{index}] contains a token that the model does not know (id {highest})",
                param=request.param,
            )
        if encoded.full_length > longest and not request.truncate:
            pair = "" if request.query is None else ", with the query,"
            raise InvalidField(
                f"{request.param}[{index}]{pair} is {encoded.full_length} tokens long; the model takes at most "
                f"{longest}, and truncate is false",
                param=request.param,
            )
        if len(encoded.ids) > longest:
            offsets = encoded.offsets[:longest] if encoded.offsets is not None else None
            encoded = Encoded(encoded.ids[:longest], encoded.full_length, offsets)
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


class _Cache:
    """The most recently used encodings, bounded in number and in the length of each text.

    A tenant finds its own only: how long a text took would tell whether another has sent it.
    """

    def __init__(self, entries: int, max_chars: int) -> None:
        self._entries, self._max_chars = entries, max_chars
        self._kept: OrderedDict[tuple[str, Text], Encoded] = OrderedDict()

    def get(self, tenant: str, text: Text) -> Encoded | None:
        encoded = self._kept.get((tenant, text))
        if encoded is not None:
            self._kept.move_to_end((tenant, text))
        return encoded

    def put(self, tenant: str, text: Text, encoded: Encoded) -> None:
        if _chars(text) > self._max_chars or self._entries == 0:
            return
        self._kept[tenant, text] = encoded
        self._kept.move_to_end((tenant, text))
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)


def _chars(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _result(encoded: Sequence[Encoded], *, with_offsets: bool) -> Tokenized:
    return Tokenized(
        ids=Ragged.of([one.ids for one in encoded]),
        truncated=tuple(one.full_length > len(one.ids) for one in encoded),
        offsets=Ragged.of([np.array(one.offsets).reshape(-1, 2) for one in encoded]) if with_offsets else None,
    )

"""Text to token ids with the model's own fast tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.fake import FakeTokenizer
from deployments.engine.protocol import Encoded, Tokenizer
from deployments.errors import ConfigError


def load_tokenizer(config: ModelConfig, card: ModelCard) -> Tokenizer:
    if config.engine == "fake":
        return FakeTokenizer(card.max_length)
    return FastTokenizer(load_pretrained_tokenizer(config, card), card)


def load_pretrained_tokenizer(config: ModelConfig, card: ModelCard) -> Any:
    """Load the model's transformers tokenizer. Raises ConfigError if the model has no fast one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        card.source, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"args.model.source: {config.source!r} has no fast tokenizer (tokenizer.json); convert it first"
        )
    return tokenizer


class FastTokenizer:
    """The Rust tokenizer behind a transformers tokenizer, set up to truncate to ``max_length`` and not to pad.

    It is called directly because it reports what it truncated (the overflow) and releases the GIL while it works.
    """

    def __init__(self, pretrained: Any, card: ModelCard) -> None:
        self._backend = pretrained.backend_tokenizer
        self._backend.no_padding()
        self._backend.enable_truncation(card.max_length)
        self._special_tokens: int = pretrained.num_special_tokens_to_add()
        self._lower_case, self._prompt = card.lower_case, card.prompt
        self.mask_token: str | None = pretrained.mask_token
        self.mask_token_id: int | None = pretrained.mask_token_id

    def encode(self, texts: Sequence[str], *, with_offsets: bool) -> list[Encoded]:
        if self._prompt:
            texts = [self._prompt + text for text in texts]
        if self._lower_case:
            texts = [text.lower() for text in texts]
        return [self._read(encoding, with_offsets) for encoding in self._backend.encode_batch(list(texts))]

    def _read(self, encoding: Any, with_offsets: bool) -> Encoded:
        truncated = sum(len(part) - self._special_tokens for part in encoding.overflowing)
        offsets = None
        if with_offsets:
            pairs = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
            offsets = [(-1, -1) if special else offset for offset, special in pairs]
        return Encoded(np.array(encoding.ids, dtype=np.int32), len(encoding) + truncated, offsets)

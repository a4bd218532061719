"""Text to token ids with the model's own fast tokenizer."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.fake import FakeTextTokenizer, FakeTokenizer
from deployments.engine.protocol import Encoded, Text, TextTokenizer, Tokenizer
from deployments.errors import ConfigError
from deployments.messages import ChatMessage, Ids


def keep_torch_out(config: ModelConfig) -> None:
    """Have transformers do without torch in this process, where only tokenizers are needed: 0.5 GB and seconds less.

    Call it when the model's card is loaded, which may convert the model. A model's own code may need torch.
    """
    if not config.trust_remote_code:
        # So Python marks a module that cannot be imported; transformers then asks for none of what needs it.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class TemplateError(ValueError):
    """A conversation that the model's chat template does not take. The message contains no text of it."""


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
        self._whole = copy.deepcopy(self._backend)
        """The same without truncation."""
        self._whole.no_truncation()
        self._backend.enable_truncation(card.max_length)
        self._special_tokens: int = pretrained.num_special_tokens_to_add()
        self._has_types = card.token_types > 1 and "token_type_ids" in pretrained.model_input_names
        self._lower_case, self._prompt = card.lower_case, card.prompt
        self.mask_token: str | None = pretrained.mask_token
        self.mask_token_id: int | None = pretrained.mask_token_id
        self.special_ids: frozenset[int] = frozenset(pretrained.all_special_ids)

    def encode(self, texts: Sequence[Text], *, with_offsets: bool) -> list[Encoded]:
        prepared = [self._prepare(text) for text in texts]
        encodings = self._backend.encode_batch(prepared)
        return [self._read(encoding, text, with_offsets) for encoding, text in zip(encodings, prepared, strict=True)]

    def describe(self, texts: Sequence[str], *, adds_special_tokens: bool) -> list[Encoded]:
        prepared = [self._prepare(text) for text in texts]
        encodings = self._whole.encode_batch(prepared, add_special_tokens=adds_special_tokens)
        return [
            Encoded(np.array(one.ids, dtype=np.int32), len(one), _offsets(one), tuple(one.tokens)) for one in encodings
        ]

    def _prepare(self, text: Text) -> Text:
        if isinstance(text, tuple):
            return (text[0].lower(), text[1].lower()) if self._lower_case else text
        text = self._prompt + text
        return text.lower() if self._lower_case else text

    def _read(self, encoding: Any, text: Text, with_offsets: bool) -> Encoded:
        length = len(encoding)
        if isinstance(text, tuple):
            # The overflow of a pair comes in combinations of both texts; its length says nothing.
            full_length = len(self._whole.encode(*text)) if encoding.overflowing else length
            if self._has_types:
                ids = np.stack([encoding.ids, encoding.type_ids], axis=1).astype(np.int32)
                return Encoded(ids, full_length)
            return Encoded(np.array(encoding.ids, dtype=np.int32), full_length)
        truncated = sum(len(part) - self._special_tokens for part in encoding.overflowing)
        return Encoded(
            np.array(encoding.ids, dtype=np.int32), length + truncated, _offsets(encoding) if with_offsets else None
        )


def _offsets(encoding: Any) -> list[tuple[int, int]]:
    pairs = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [(-1, -1) if special else offset for offset, special in pairs]


def load_text_tokenizer(config: ModelConfig, card: ModelCard) -> TextTokenizer:
    if config.engine == "fake":
        return FakeTextTokenizer()
    return PretrainedTextTokenizer(load_pretrained_tokenizer(config, card))


class PretrainedTextTokenizer:
    """The tokenizer of a language model: both ways, and its chat template."""

    def __init__(self, pretrained: Any) -> None:
        self._pretrained, self._backend = pretrained, pretrained.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._special = frozenset(pretrained.all_special_ids)

    def encode(self, text: str) -> Ids:
        return np.array(self._backend.encode(text).ids, dtype=np.int32)

    def render(self, messages: Sequence[ChatMessage]) -> Ids:
        if self._pretrained.chat_template is None:
            raise TemplateError("the model has no chat template; send a prompt to /v1/completions")
        import jinja2

        conversation = [
            {"role": one.role, "content": one.content} | ({"name": one.name} if one.name else {}) for one in messages
        ]
        try:
            text = self._pretrained.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            # A template is a program of the model's authors, which says itself what it does not take.
            raise TemplateError(f"the model's chat template does not take these messages: {error.message}") from None
        # The template writes the special tokens itself.
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode([i for i in ids if i not in self._special], skip_special_tokens=False)
        return text

"""A deterministic stand-in for a model: a swapped or lost item shows up as a wrong number.

The embedding of ids ``i1..in`` is ``[n, i1, in, checksum]`` divided by its norm, so a test can compute each expected
result. Runs can also be slowed down, held, and made to raise on one token, so that tests can force batches to form and
everything but the model can be measured.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deployments.config import FakeConfig
from deployments.engine.protocol import Encoded, Memory, OutOfMemory, Phase, Run, Text, WarmUp
from deployments.messages import ChatMessage, Ids


def fake_token_id(word: str) -> int:
    """The id of a word: stable across processes, between 3 and 29,999."""
    return 3 + zlib.crc32(word.encode()) % 29_997


def fake_embedding(ids: Sequence[int]) -> np.ndarray:
    """Output of ``FakeEngine`` for ``ids``: shape ``[4]``, norm 1."""
    raw = np.array([len(ids), ids[0], ids[-1], sum(i * (k + 1) for k, i in enumerate(ids)) % 9973], dtype=np.float32)
    return raw / np.linalg.norm(raw)


def fake_score(ids: Sequence[int]) -> np.ndarray:
    """Output of ``FakeEngine`` for a pair of texts: a logit of shape ``[1]`` between -4 and 4."""
    checksum = sum(i * (k + 1) for k, i in enumerate(ids)) % 9973
    return np.array([checksum / 9973 * 8 - 4], dtype=np.float32)


class FakeTokenizer:
    """Splits at whitespace; the special tokens 1 and 2 enclose the words. A pair of texts is one text."""

    mask_token: str | None = None
    mask_token_id: int | None = None
    special_ids = frozenset({1, 2})

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length

    def encode(self, texts: Sequence[Text], *, with_offsets: bool) -> list[Encoded]:  # noqa: ARG002
        return [self._encode((text if isinstance(text, str) else " ".join(text)).split()) for text in texts]

    def describe(self, texts: Sequence[str], *, adds_special_tokens: bool) -> list[Encoded]:
        return [self._describe(text, adds_special_tokens) for text in texts]

    def _describe(self, text: str, adds_special_tokens: bool) -> Encoded:
        words = [(match.group(), match.span()) for match in re.finditer(r"\S+", text)]
        if adds_special_tokens:
            words = [("<s>", (-1, -1)), *words, ("</s>", (-1, -1))]
        ids = [{"<s>": 1, "</s>": 2}.get(word) or fake_token_id(word) for word, _ in words]
        tokens = tuple(word for word, _ in words)
        return Encoded(np.array(ids, dtype=np.int32), len(ids), [span for _, span in words], tokens)

    def _encode(self, words: list[str]) -> Encoded:
        kept = [fake_token_id(word) for word in words[: self._max_length - 2]]
        return Encoded(np.array([1, *kept, 2], dtype=np.int32), len(words) + 2)


class FakeTextTokenizer:
    """Words to ids, and ids to words: ``w123`` for any id but the special ones."""

    def encode(self, text: str) -> Ids:
        return np.array([1, *map(fake_token_id, text.split())], dtype=np.int32)

    def render(self, messages: Sequence[ChatMessage]) -> Ids:
        return self.encode(" ".join(f"{one.role}: {one.content}" for one in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{i}" for i in ids if i > 2)


class FakeEngine:
    device = "cpu"
    pad_to_multiple_of = 1
    broken: str | None = None

    def __init__(self, config: FakeConfig, *, ranks: bool = False) -> None:
        self._config = config
        self._ranks = ranks

    def load(self, phase: Phase) -> WarmUp:
        with phase("weights"):
            time.sleep(self._config.load_ms / 1000)
        return WarmUp(tuple((tokens, self._run_s(tokens) * 1e9 + 1e5) for tokens in (1, 1000)))

    def collate(self, batch: Sequence[Ids]) -> Sequence[Ids]:
        return batch

    def run(self, batch: Sequence[Ids]) -> Run:
        started = time.perf_counter()
        padded = max(len(ids) for ids in batch) * len(batch)
        if self._config.memory_tokens is not None and padded > self._config.memory_tokens:
            raise OutOfMemory(f"{padded} padded tokens do not fit into {self._config.memory_tokens}")
        if self._config.poison_token is not None and any(self._config.poison_token in ids for ids in batch):
            raise ValueError("the fake model received its poison token")
        while self._config.hold_path is not None and Path(self._config.hold_path).exists():
            time.sleep(0.002)
        time.sleep(self._run_s(padded))
        outputs = [self._output((ids if ids.ndim == 1 else ids[:, 0]).tolist()) for ids in batch]
        return Run(outputs, (time.perf_counter() - started) * 1e3, padded, (len(batch), len(outputs[0])))

    def _output(self, ids: Sequence[int]) -> np.ndarray:
        return fake_score(ids) if self._ranks else np.resize(fake_embedding(ids), self._config.hidden_size)

    def _run_s(self, padded_tokens: int) -> float:
        return self._config.base_ms / 1e3 + padded_tokens * self._config.per_token_us / 1e6

    def memory(self) -> Memory | None:
        return None

"""A deterministic stand-in for a language model, see ``engine.fake``.

The token that follows depends on all tokens before it, so that a lost or swapped one changes all that come after. A
prompt with the word ``end`` is answered with five tokens and the end of the text.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deployments.batching.generation.steps import Member
from deployments.batching.generation.steps import Sequence as Generation
from deployments.config import FakeConfig, GenerationConfig
from deployments.engine.fake import fake_token_id
from deployments.engine.protocol import Memory, Phase, Sampled, WarmUp
from deployments.messages import Sampling, TokenLogprobs

END = 2
_SHORT = 5


def fake_continuation(prompt: Sequence[int], tokens: int, seed: int = 0) -> list[int]:
    """Output of ``FakeGenerator`` for a prompt."""
    ids = list(prompt)
    for index in range(tokens):
        if fake_token_id("end") in prompt and index == _SHORT:
            ids.append(END)
            break
        ids.append(3 + zlib.crc32(np.array([seed, *ids], dtype="<i4").tobytes()) % 29_997)
    return ids[len(prompt) :]


class FakeCache:
    """Pages that are counted, not stored; nothing is shared."""

    page = 16

    def __init__(self, tokens: int) -> None:
        self.capacity = tokens // self.page * self.page
        self.held: Counter[int] = Counter()

    def match(self, sequence: Generation) -> int:  # noqa: ARG002
        return 0

    def hold(self, sequence: Generation, tokens: int) -> bool:
        wanted = -(-(sequence.computed + tokens) // self.page)
        others = sum(self.held.values()) - self.held[sequence.number]
        if wanted + others > self.capacity // self.page:
            return False
        self.held[sequence.number] = wanted
        return True

    def release(self, sequence: Generation) -> None:
        del self.held[sequence.number]


class FakeGenerator:
    device = "cpu"
    broken: str | None = None
    end_tokens = frozenset({END})

    def __init__(self, config: FakeConfig, limits: GenerationConfig) -> None:
        self._config = config
        self.cache = FakeCache(limits.kv_cache_tokens or 16_384)
        self._sampling: dict[int, Sampling] = {}

    def load(self, phase: Phase) -> WarmUp:
        with phase("weights"):
            time.sleep(self._config.load_ms / 1000)
        return WarmUp()

    def start(self, number: int, sampling: Sampling) -> None:
        self._sampling[number] = sampling

    def forget(self, number: int) -> None:
        self._sampling.pop(number, None)

    def step(self, members: Sequence[Member]) -> list[Sampled | None]:
        while self._config.hold_path is not None and Path(self._config.hold_path).exists():
            time.sleep(0.002)
        tokens = sum(member.tokens for member in members)
        time.sleep(self._config.base_ms / 1e3 + tokens * self._config.per_token_us / 1e6)
        for member in members:
            if self._config.poison_token in member.sequence.next_tokens(member.tokens):
                raise ValueError("the fake model received its poison token")
        return [self._sampled(member.sequence) if member.samples else None for member in members]

    def _sampled(self, sequence: Generation) -> Sampled:
        sampling = self._sampling[sequence.number]
        seed = (sampling.seed or 0) if sampling.temperature else 0
        token = fake_continuation(sequence.prompt, len(sequence.generated) + 1, seed)[-1]
        if sampling.logprobs is None:
            return Sampled(token)
        return Sampled(token, TokenLogprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(sampling.logprobs))))

    def memory(self) -> Memory | None:
        return None

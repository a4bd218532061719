"""Chooses the next token of each sequence, each by its own settings and its own random numbers.

A sequence draws one number for each token, from a generator of its own: whoever else is in the step, the same seed
gives the same choice from the same logits. The logits themselves differ in the last bits with the shape of the step.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch

from deployments.engine.protocol import Sampled
from deployments.messages import Sampling, TokenLogprobs

_LIKELY = 256
"""Tokens that are sorted first; more only if these do not make up ``top_p``."""
_MAX_SEED = 2**63 - 1


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: its settings. Without a seed, a random one is used.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed & _MAX_SEED
        self._random = torch.Generator().manual_seed(seed)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0 or self.sampling.top_k == 1

    def choose(self, logits: torch.Tensor) -> int:
        """Choose by temperature, then ``top_k``, then ``top_p``, from ``logits`` of shape ``[vocabulary]``, float32."""
        drawn = torch.rand((), generator=self._random, dtype=torch.float64).item()
        return _inverse(logits / self.sampling.temperature, self.sampling.top_k, self.sampling.top_p, drawn)


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """Choose a token for each row of ``logits``, ``[rows, vocabulary]``, float32."""
    greedy = logits.argmax(dim=-1).tolist()
    return [
        _reported(row, sampler, best if sampler.is_greedy else sampler.choose(row))
        for row, sampler, best in zip(logits, samplers, greedy, strict=True)
    ]


def _inverse(logits: torch.Tensor, top_k: int, top_p: float, drawn: float) -> int:
    """Return the token at which the cumulated probability, likeliest first, exceeds ``drawn`` of the whole."""
    size = logits.shape[-1]
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    limit = min(top_k or size, size)
    if limit == size and top_p >= 1:
        # Unlimited: in the order of the vocabulary, which needs no sorting.
        order, kept = None, probabilities
    else:
        order, kept = _likeliest(probabilities, limit, top_p)
    cumulated = kept.double().cumsum(dim=-1)
    at = int(torch.searchsorted(cumulated, cumulated[-1] * drawn, right=True))
    at = min(at, kept.shape[-1] - 1)
    return at if order is None else int(order[at])


def _likeliest(probabilities: torch.Tensor, limit: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that ``top_k`` and then ``top_p`` leave, and their probabilities, likeliest first."""
    size = probabilities.shape[-1]
    best: Any = probabilities.topk(limit if limit < size else min(size, _LIKELY))
    found = float(best.values.double().sum())
    # ``top_p`` is of what ``top_k`` leaves.
    whole = found if limit < size else 1.0
    if limit == size and found < top_p:
        best = probabilities.sort(descending=True)
    before = best.values.double().cumsum(dim=-1) - best.values.double()
    count = max(1, int((before < top_p * whole).sum()))
    return best.indices[:count], best.values[:count]


def _reported(logits: torch.Tensor, sampler: Sampler, token: int) -> Sampled:
    count = sampler.sampling.logprobs
    if count is None:
        return Sampled(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.topk(count) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Sampled(token, TokenLogprobs(float(logprobs[token]), top))

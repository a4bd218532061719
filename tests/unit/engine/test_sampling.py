"""The choice of the next token: by its own settings, and the same whoever else is in the step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deployments.engine.generation.sampling import Sampler, sample
from deployments.messages import Sampling

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = PROBABILITIES.log()
DRAWS = 4000


def drawn(sampling: Sampling, logits: torch.Tensor = LOGITS, draws: int = DRAWS) -> dict[int, float]:
    sampler = Sampler(sampling)
    counts = Counter(sampler.choose(logits) for _ in range(draws))
    return {token: counts[token] / draws for token in sorted(counts)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(seed=1), {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        (Sampling(seed=1, top_k=2), {1: 4 / 7, 3: 3 / 7}),
        # The fewest likeliest tokens that make up 75 %: 0.4, 0.3, 0.15.
        (Sampling(seed=1, top_p=0.75), {1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}),
        # Of the three that are left 60 % are made up by the first two.
        (Sampling(seed=1, top_k=3, top_p=0.6), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(seed=1, top_p=1e-9), {1: 1.0}),
        (Sampling(seed=1, temperature=0.5, top_k=2), {1: 16 / 25, 3: 9 / 25}),
    ],
)
def test_tokens_are_as_frequent_as_they_are_probable(sampling: Sampling, expected: dict[int, float]) -> None:
    found = drawn(sampling)
    assert set(found) == set(expected)
    for token, share in expected.items():
        assert found[token] == pytest.approx(share, abs=0.03)


def test_a_large_vocabulary_is_cut_by_top_p_as_a_small_one() -> None:
    logits = torch.zeros(5000)
    assert len(drawn(Sampling(seed=1, top_p=0.5), logits)) <= 2500
    logits[7] = 20.0
    assert drawn(Sampling(seed=1, top_p=0.9), logits, 50) == {7: 1.0}


def test_the_same_seed_gives_the_same_tokens_in_any_company() -> None:
    alone = Sampler(Sampling(seed=5))
    expected = [one.token for _ in range(20) for one in sample(LOGITS[None], [alone])]
    own, others = Sampler(Sampling(seed=5)), [Sampler(Sampling(seed=s)) for s in (1, 2)]
    rows = torch.stack([LOGITS.flip(0), LOGITS, LOGITS])
    got = [sample(rows, [others[0], own, others[1]])[1].token for _ in range(20)]
    assert got == expected
    assert [one.token for _ in range(20) for one in sample(LOGITS[None], [Sampler(Sampling(seed=6))])] != expected


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=1)])
def test_greedy_takes_the_most_probable(sampling: Sampling) -> None:
    assert [one.token for one in sample(torch.stack([LOGITS, LOGITS.flip(0)]), [Sampler(sampling)] * 2)] == [1, 3]


def test_log_probabilities_are_the_models_whatever_the_settings() -> None:
    (one,) = sample(LOGITS[None] + 3.0, [Sampler(Sampling(temperature=0.0, logprobs=2))])
    assert one.logprobs is not None
    assert one.logprobs.chosen == pytest.approx(float(LOGITS[1]), abs=1e-5)
    assert [token for token, _ in one.logprobs.top] == [1, 3]
    assert [logprob for _, logprob in one.logprobs.top] == pytest.approx([float(LOGITS[1]), float(LOGITS[3])], abs=1e-5)
    (bare,) = sample(LOGITS[None], [Sampler(Sampling(logprobs=0))])
    assert bare.logprobs is not None
    assert bare.logprobs.top == ()
    (none,) = sample(LOGITS[None], [Sampler(Sampling())])
    assert none.logprobs is None


def test_negative_seeds_are_seeds_too() -> None:
    assert drawn(Sampling(seed=-3), draws=20) == drawn(Sampling(seed=-3), draws=20)

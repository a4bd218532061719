"""The engine of language models: the same tokens as ``model.generate``, whoever else is in the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.batching.generation.steps import Sequence, StepLimits
from deployments.messages import Sampling
from tests.support.models import LANGUAGE_MODELS, save_language_model
from tests.support.steps import Steps, engine, tokens_of

PROMPTS = ["a", "hello there, how are you", "x" * 150, "the quick brown fox " * 12, "hello there, who are you"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


LIMITS = StepLimits(8, 512, 1e6, 1.0)


def expected(model: Any, text: str, tokens: int) -> list[int]:
    ids = torch.tensor([tokens_of(text)])
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


def test_the_tokens_are_those_of_generate_alone_and_in_company(folder: Path, reference: Any) -> None:
    made = engine(folder)
    wanted = [expected(reference, text, 20) for text in PROMPTS]
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)
    alone = Steps(made, LIMITS)
    for text, tokens in zip(PROMPTS, wanted, strict=True):
        sequence = alone.add(text, 20)
        alone.run()
        assert sequence.generated == tokens
    together = Steps(made, LIMITS)
    sequences = [together.add(text, 20) for text in PROMPTS]
    together.run()
    assert [sequence.generated for sequence in sequences] == wanted


@pytest.mark.parametrize("kind", sorted(set(LANGUAGE_MODELS) - {"llama"}))
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path, kind)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    steps = Steps(engine(folder), LIMITS)
    sequences = [steps.add(text, 20) for text in PROMPTS]
    steps.run()
    assert [sequence.generated for sequence in sequences] == [expected(reference, text, 20) for text in PROMPTS]


def test_the_same_in_chunks_with_arrivals_and_departures_in_between(folder: Path, reference: Any) -> None:
    steps = Steps(engine(folder, max_batch_tokens=16, max_sequences=8), StepLimits(8, 16, 1e6, 1.0))
    first = [steps.add(text, 30) for text in PROMPTS[:3]]
    for _ in range(5):
        steps.step()
    late = [steps.add(text, 10) for text in PROMPTS[3:]]
    for _ in range(5):
        steps.step()
    steps.remove(first[1])
    steps.run()
    assert first[0].generated == expected(reference, PROMPTS[0], 30)
    assert first[2].generated == expected(reference, PROMPTS[2], 30)
    assert [one.generated for one in late] == [expected(reference, text, 10) for text in PROMPTS[3:]]


def test_the_same_after_preemption(folder: Path, reference: Any) -> None:
    steps = Steps(engine(folder, kv_cache_tokens=192), StepLimits(8, 64, 1e6, 0.0))
    sequences = [steps.add(text, 60) for text in PROMPTS[:2] + PROMPTS[4:]]
    steps.run()
    assert steps.preempted
    wanted = [expected(reference, text, 60) for text in PROMPTS[:2] + PROMPTS[4:]]
    assert [sequence.generated for sequence in sequences] == wanted


def test_what_prompts_begin_with_is_computed_once(folder: Path, reference: Any) -> None:
    steps = Steps(engine(folder), LIMITS)
    first = steps.add(PROMPTS[3] + "one", 5)
    steps.run()
    second, third = steps.add(PROMPTS[3] + "two", 5), steps.add(PROMPTS[3] + "three", 5)
    steps.run()
    assert first.cached == 0
    assert second.cached == third.cached == len(PROMPTS[3]) // 32 * 32
    assert second.generated == expected(reference, PROMPTS[3] + "two", 5)
    assert third.generated == expected(reference, PROMPTS[3] + "three", 5)


def test_no_block_is_lost(folder: Path) -> None:
    made = engine(folder, kv_cache_tokens=1024)
    steps = Steps(made, StepLimits(8, 64, 1e6, 0.5))
    for round_ in range(6):
        sequences = [steps.add(f"{round_} {text}", 20) for text in PROMPTS]
        for _ in range(4):
            steps.step()
        for sequence in sequences[round_ % 2 :: 2]:
            steps.remove(sequence)
        steps.run()
    whole = Sequence(10**6, tokens_of("y" * 1000), 20)
    made.cache.match(whole)
    assert made.cache.hold(whole, 1020)
    made.cache.release(whole)


def test_a_seed_gives_the_same_text_alone_and_in_company(folder: Path) -> None:
    made = engine(folder)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=3)
    alone = Steps(made, LIMITS)
    first = alone.add(PROMPTS[1], 30, sampling)
    alone.run()
    together = Steps(made, LIMITS)
    others = [together.add(text, 30, Sampling(seed=n)) for n, text in enumerate(PROMPTS)]
    second = together.add(PROMPTS[1], 30, sampling)
    together.run()
    assert second.generated == first.generated
    assert others[1].generated != first.generated

"""How the engine's performance settings affect its results. Runs the engine directly, without a cluster."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.load import load_engine
from deployments.engine.protocol import Run
from deployments.engine.tokenizers import load_tokenizer
from deployments.errors import ConfigError

TEXTS = [
    "short",
    "what is the balance of my checking account",
    "the river ran quietly under an old stone bridge while children played near the willow trees",
    "i lost my credit card and " + "waited for an answer " * 30,
]


@contextlib.contextmanager
def phase(_: str) -> Iterator[None]:
    yield


def embed(texts: Sequence[str] = TEXTS, **model: object) -> Run:
    config = AppConfig.parse({"model": model, "batching": {"max_batch_size": 4, "max_batch_tokens": 512}})
    card = ModelCard.load(config.model)
    engine = load_engine(config, card, has_gpu=False, cpus=1)
    warm_up = engine.load(phase)
    assert len(warm_up.runs) >= 3
    assert warm_up.too_large is None
    encoded = load_tokenizer(config.model, card).encode(texts, with_offsets=False)
    return engine.run(engine.collate([one.ids for one in encoded]))


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def least_cosine(one: Run, other: Run) -> float:
    return min(cosine(a, b) for a, b in zip(one.outputs, other.outputs, strict=True))


@pytest.fixture(scope="module")
def plain() -> Run:
    return embed(dtype="float32")


def test_int8_stays_close_to_float32(plain: Run) -> None:
    quantized = embed(quantization="int8")

    assert 0.95 <= least_cosine(plain, quantized) < 0.99999


def test_padding_to_a_multiple_changes_the_shape_but_not_the_results() -> None:
    plain = embed(TEXTS[:3], dtype="float32")
    padded = embed(TEXTS[:3], dtype="float32", pad_to_multiple_of=64)

    assert padded.output_shape[1] % 64 == 0
    assert plain.output_shape[1] % 64 != 0
    assert padded.padded_tokens == padded.output_shape[0] * padded.output_shape[1]
    assert least_cosine(plain, padded) >= 0.99999


def test_padding_to_a_multiple_does_not_exceed_max_length() -> None:
    run = embed(dtype="float32", pad_to_multiple_of=100, max_length=130)

    assert run.output_shape[1] == 130


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_gives_the_same_results(plain: Run) -> None:
    assert least_cosine(plain, embed(dtype="float32", compile=True)) >= 0.9999


def test_int8_is_rejected_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = AppConfig.parse({"model": {"quantization": "int8", "device": "cuda", "dtype": "float32"}})
    with pytest.raises(ConfigError, match=r"args\.model\.quantization: int8 is for CPUs"):
        load_engine(config, ModelCard.load(config.model), has_gpu=True, cpus=1)

"""Model output to JSON, for each task. That it agrees with transformers' pipelines is tested on real models."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from deployments.config import AppConfig, ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.fake import FakeEngine
from deployments.engine.load import load_engine
from deployments.engine.outputs.predictions import PredictionBuilder, classify
from deployments.engine.outputs.scores import softmax
from deployments.errors import ModelFailed
from deployments.messages import OutputOptions, Ragged, Tokenized

CARD = replace(ModelCard.load(ModelConfig(engine="fake")), labels=("no", "maybe", "yes"))
PREDICT = OutputOptions("/predict")
BEST = msgspec.structs.replace(PREDICT, top_k=1)


class Vocabulary:
    """A transformers tokenizer, as far as it is needed."""

    mask_token_id, unk_token_id = 9, 0

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"t{token}"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"t{i}" for i in ids if not (skip_special_tokens and i == 9))


def tokenized(*rows: list[int], offsets: list[Any] | None = None) -> Tokenized:
    return Tokenized(
        Ragged.of(list(rows)),
        tuple(len(row) > 3 for row in rows),
        Ragged.of(offsets) if offsets is not None else None,
    )


def fragments(task: str, outputs: list[Any], tokens: Tokenized, options: OutputOptions = PREDICT, *texts: str) -> Any:
    builder = PredictionBuilder(replace(CARD, task=task), Vocabulary())  # type: ignore[arg-type]
    return [json.loads(one) for one in builder.build(tokens, outputs, options, texts).fragments]


def test_embeddings_of_both_routes() -> None:
    output = np.array([0.6, 0.8, 0.0], dtype=np.float32)
    tokens = tokenized([1, 2], [1, 2, 3, 4])

    assert fragments("embeddings", [output, output], tokens) == [
        {"embedding": pytest.approx([0.6, 0.8, 0.0]), "truncated": False},
        {"embedding": pytest.approx([0.6, 0.8, 0.0]), "truncated": True},
    ]
    options = OutputOptions("/v1/embeddings", dimensions=1)
    assert fragments("embeddings", [output], tokens, options) == [
        {"object": "embedding", "index": 0, "embedding": [1.0]}
    ]
    (packed,) = fragments("embeddings", [output], tokens, OutputOptions("/v1/embeddings", base64=True))
    assert np.frombuffer(base64.b64decode(packed["embedding"]), "<f4").tolist() == output.tolist()


def test_a_dimension_of_zeros_is_no_division_by_zero() -> None:
    (item,) = fragments(
        "embeddings",
        [np.array([0.0, 1.0], dtype=np.float32)],
        tokenized([1]),
        OutputOptions("/v1/embeddings", dimensions=1),
    )
    assert item["embedding"] == [0.0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [("softmax", [0.665, 0.245, 0.090]), ("sigmoid", [0.881, 0.731, 0.5]), ("none", [2.0, 1.0, 0.0])],
)
def test_classification_ranks_labels_by_score(function: Any, expected: list[float]) -> None:
    logits = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    found = classify(logits, replace(CARD, score_function=function), None)

    assert [score["label"] for score in found["scores"]] == ["yes", "maybe", "no"]
    assert [score["score"] for score in found["scores"]] == pytest.approx(expected, abs=1e-3)
    assert (found["label"], found["score"]) == (found["scores"][0]["label"], found["scores"][0]["score"])
    assert len(classify(logits, CARD, 2)["scores"]) == 2


def test_classification_over_the_route() -> None:
    (found,) = fragments(
        "text-classification",
        [np.array([3.0, 0.0, 0.0], dtype=np.float32)],
        tokenized([1]),
        BEST,
    )
    assert (found["label"], len(found["scores"]), found["truncated"]) == ("no", 1, False)


def test_entities_are_tokens_with_a_label_and_unknown_ones_keep_their_text() -> None:
    card = replace(CARD, task="token-classification", labels=("O", "PER"))
    builder = PredictionBuilder(card, Vocabulary())
    logits = np.array([[0, 5], [0, 5], [5, 0], [0, 5]], dtype=np.float32)
    tokens = tokenized([1, 7, 8, 0], offsets=[[(-1, -1), (0, 3), (4, 7), (8, 11)]])
    (found,) = (json.loads(one) for one in builder.build(tokens, [logits], PREDICT, ("bob sat xyz",)).fragments)

    assert [(e["word"], e["start"], e["end"], e["entity"]) for e in found["entities"]] == [
        ("t7", 0, 3, "PER"),
        ("xyz", 8, 11, "PER"),
    ]
    assert found["entities"][0]["score"] == pytest.approx(softmax(logits)[1, 1])


def test_fills_say_which_mask_where_there_are_several() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]], dtype=np.float32)
    candidates = np.array([[4, 5], [6, 7]], dtype=np.int32)
    (one,) = fragments("fill-mask", [(probabilities[:1], candidates[:1])], tokenized([1, 9, 2]))
    (two,) = fragments("fill-mask", [(probabilities, candidates)], tokenized([9, 3, 9]), BEST)

    assert one["fills"][0] == {"token": "t4", "score": pytest.approx(0.9), "sequence": "t1 t4 t2"}
    assert [(fill["mask"], fill["token"], fill["sequence"]) for fill in two["fills"]] == [
        (0, "t4", "t4 t3 t9"),
        (1, "t6", "t9 t3 t6"),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_a_failure_of_the_model(value: float) -> None:
    with pytest.raises(ModelFailed, match="non-finite number for input 0"):
        fragments("embeddings", [np.array([value], dtype=np.float32)], tokenized([1]))


def test_the_fake_engine_is_loaded_where_it_is_asked_for() -> None:
    config = AppConfig.parse({"model": {"engine": "fake"}})

    assert isinstance(load_engine(config, CARD, has_gpu=False, cpus=1.0), FakeEngine)

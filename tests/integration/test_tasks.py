"""Every task over HTTP, compared with the transformers pipeline on the same small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests.support.http import call
from tests.support.models import save_model

TEXTS = ["alice likes the cat", "the dog sat on the mat in london", "bob runs to paris from unknownplace", "cat"]
MASKED = ["the [MASK] sat on the mat", "alice likes [MASK]", "[MASK] cat"]


def predict(port: int, inputs: list[str], **parameters: Any) -> dict[str, Any]:
    answer = call(port, "POST", "/predict", {"inputs": inputs, "parameters": parameters})
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.json()
    return body


@pytest.fixture(scope="module")
def served(deploy: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int, Path]]:
    def run(task: str) -> tuple[int, Path]:
        folder = save_model(task, tmp_path_factory.mktemp(task))
        return deploy(model={"source": str(folder), "dtype": "float32", "device": "cpu"}), folder

    return run


def test_text_classification(served: Callable[[str], tuple[int, Path]]) -> None:
    port, folder = served("text-classification")
    body = predict(port, TEXTS)
    expected = pipeline("text-classification", str(folder), top_k=None)(TEXTS)

    assert body["task"] == "text-classification"
    assert body["model"] == folder.name
    for prediction, ranked in zip(body["predictions"], expected, strict=True):
        assert prediction["truncated"] is False
        assert [s["label"] for s in prediction["scores"]] == [s["label"] for s in ranked]
        assert [s["score"] for s in prediction["scores"]] == pytest.approx([s["score"] for s in ranked], abs=1e-5)
        assert (prediction["label"], prediction["score"]) == tuple(prediction["scores"][0].values())
    assert [len(p["scores"]) for p in predict(port, TEXTS, top_k=2)["predictions"]] == [2] * len(TEXTS)
    refused = call(port, "POST", "/v1/embeddings", {"input": "a"})
    assert (refused.status, refused.error["param"]) == (422, "model")


def test_token_classification(served: Callable[[str], tuple[int, Path]]) -> None:
    port, folder = served("token-classification")
    body = predict(port, TEXTS)
    expected = pipeline("token-classification", str(folder))(TEXTS)

    assert any(entities for entities in expected)
    for prediction, entities in zip(body["predictions"], expected, strict=True):
        assert len(prediction["entities"]) == len(entities)
        for ours, theirs in zip(prediction["entities"], entities, strict=True):
            assert ours.pop("score") == pytest.approx(theirs["score"], abs=1e-5)
            assert ours == {key: theirs[key] for key in ("entity", "word", "start", "end")}

    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, len(ids)], "data": ids}
    answer = call(port, "POST", f"/v2/models/{folder.name}/infer", {"inputs": [tensor]})
    (of_ids,) = answer.json()["outputs"][0]["data"]
    assert [(one["entity"], one["word"], one["start"]) for one in json.loads(of_ids)["entities"]] == [
        (one["entity"], one["word"], None) for one in expected[0]
    ]


def test_fill_mask(served: Callable[[str], tuple[int, Path]]) -> None:
    port, folder = served("fill-mask")
    fill = pipeline("fill-mask", str(folder))
    for top_k in (None, 3):
        body = predict(port, MASKED, **({} if top_k is None else {"top_k": top_k}))
        for prediction, expected in zip(body["predictions"], fill(MASKED, top_k=top_k or 5), strict=True):
            assert [(f["token"], f["sequence"]) for f in prediction["fills"]] == [
                (e["token_str"], e["sequence"]) for e in expected
            ]
            assert [f["score"] for f in prediction["fills"]] == pytest.approx([e["score"] for e in expected], abs=1e-5)

    (two_masks,) = predict(port, ["[MASK] likes [MASK]"], top_k=2)["predictions"]
    expected = fill("[MASK] likes [MASK]", top_k=2)
    assert [(f["mask"], f["token"], f["sequence"]) for f in two_masks["fills"]] == [
        (number, e["token_str"], e["sequence"]) for number, fills in enumerate(expected) for e in fills
    ]
    refused = call(port, "POST", "/predict", {"inputs": ["the [MASK]", "no mask here"]})
    assert refused.status == 422
    assert refused.error["message"].startswith("inputs[1] must contain the mask token [MASK]")
    assert call(port, "POST", "/predict", {"inputs": "[MASK]", "parameters": {"top_k": 101}}).status == 422
    many = call(port, "POST", "/predict", {"inputs": "[MASK] " * 17})
    assert (many.status, many.error["message"].rpartition("; ")[2]) == (422, "got 17")


def test_text_ranking(served: Callable[[str], tuple[int, Path]]) -> None:
    port, folder = served("text-ranking")
    query, texts = "alice likes the cat", [*TEXTS, " ".join(["the big dog runs from"] * 12)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = tokenizer([query] * len(texts), texts, truncation=True, padding=True, return_tensors="pt")
    assert encoded["token_type_ids"].any(), "the model tells the two texts apart"
    assert encoded["input_ids"].shape[1] == 32, "the last pair is truncated"
    with torch.no_grad():
        logits = model(**encoded).logits[:, 0]

    raw = call(port, "POST", "/rerank", {"query": query, "texts": texts, "raw_scores": True})
    scores = {one["index"]: one["score"] for one in raw.json()}
    assert [scores[i] for i in range(len(texts))] == pytest.approx(logits.tolist(), abs=1e-4)
    cohere = call(port, "POST", "/v1/rerank", {"query": query, "documents": texts, "top_n": 2})
    best = logits.argsort(descending=True)[:2].tolist()
    assert [one["index"] for one in cohere.json()["results"]] == best
    assert [one["relevance_score"] for one in cohere.json()["results"]] == pytest.approx(
        logits.sigmoid()[best].tolist(), abs=1e-5
    )
    refused = call(port, "POST", "/rerank", {"query": query, "texts": texts, "truncate": False})
    whole = len(tokenizer(query, texts[-1])["input_ids"])
    assert (refused.status, refused.json()["error_type"]) == (422, "Validation")
    assert f"texts[4], with the query, is {whole} tokens long; the model takes at most 32" in refused.json()["error"]

    tokens = call(port, "POST", "/tokenize", {"inputs": [texts[2]]}).json()[0]
    expected = tokenizer(texts[2], return_offsets_mapping=True)
    assert [one["id"] for one in tokens] == expected["input_ids"]
    assert [(one["start"], one["stop"]) for one in tokens[1:-1]] == expected["offset_mapping"][1:-1]
    assert [one["text"] for one in (tokens[0], tokens[-1])] == ["[CLS]", "[SEP]"]
    pairs = tokenizer([query] * 2, texts[:2], padding=True)
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = [
        {"name": name, "datatype": "INT64", "shape": [2, len(pairs[name][0])], "data": pairs[name]} for name in names
    ]
    of_ids = call(
        port, "POST", f"/v2/models/{folder.name}/infer", {"inputs": inputs, "parameters": {"raw_scores": True}}
    )
    assert of_ids.json()["outputs"][0]["data"] == pytest.approx(logits[:2].tolist(), abs=1e-4)

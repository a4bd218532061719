"""The routes of text-embeddings-inference and of Cohere, on real stages with the fake engine, in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from deployments.engine.fake import fake_embedding, fake_score, fake_token_id
from tests.support.local import Application, run_with_client

Client = httpx2.AsyncClient
ENCODER = {"engine": "fake", "name": "small"}
RANKER = {"engine": "fake", "name": "ranker", "task": "text-ranking"}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def with_client(use: Callable[[Client], Awaitable[None]], **model: Any) -> None:
    run_with_client(lambda: Application(model=model or ENCODER), lambda client, _: use(client))


def ids(text: str) -> list[int]:
    return [1, *map(fake_token_id, text.split()), 2]


def test_embed_returns_a_list_of_lists_whatever_was_sent() -> None:
    async def use(client: Client) -> None:
        one = await client.post("/embed", json={"inputs": "a b"})
        several = await client.post("/embed", json={"inputs": ["a b", "c"], "truncate": True, "prompt_name": None})
        tokens = await client.post("/embed", json={"inputs": [[5, 6], [7]]})
        cut = await client.post("/embed", json={"inputs": "a b", "dimensions": 2, "normalize": False})

        assert one.json() == [pytest.approx(fake_embedding(ids("a b")).tolist())]
        assert several.json()[1] == pytest.approx(fake_embedding(ids("c")).tolist())
        assert tokens.json() == [pytest.approx(fake_embedding(each).tolist()) for each in ([5, 6], [7])]
        assert cut.json() == [pytest.approx(fake_embedding(ids("a b")).tolist()[:2])]

    with_client(use)


def test_similarity_is_the_cosine_to_the_source() -> None:
    async def use(client: Client) -> None:
        inputs = {"source_sentence": "a b", "sentences": ["a b", "c d e"]}
        answer = await client.post("/similarity", json={"inputs": inputs})
        other = float(fake_embedding(ids("a b")) @ fake_embedding(ids("c d e")))
        assert answer.json() == pytest.approx([1.0, other])

    with_client(use)


def test_tokenize_tells_where_each_token_is() -> None:
    async def use(client: Client) -> None:
        whole = await client.post("/tokenize", json={"inputs": "a bc"})
        bare = await client.post("/tokenize", json={"inputs": ["a", "bc"], "add_special_tokens": False})
        parts = [part.partition(";dur=") for part in whole.headers["server-timing"].split(", ")]
        timing = {name: float(ms) for name, _, ms in parts}

        a, bc = fake_token_id("a"), fake_token_id("bc")
        assert whole.json() == [
            [
                {"id": 1, "text": "<s>", "special": True, "start": None, "stop": None},
                {"id": a, "text": "a", "special": False, "start": 0, "stop": 1},
                {"id": bc, "text": "bc", "special": False, "start": 2, "stop": 4},
                {"id": 2, "text": "</s>", "special": True, "start": None, "stop": None},
            ]
        ]
        assert [[token["id"] for token in tokens] for tokens in bare.json()] == [[a], [bc]]
        assert timing["total"] == pytest.approx(sum(ms for name, ms in timing.items() if name != "total"), abs=1)
        assert timing["forward"] == 0

    with_client(use)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/embed", {"inputs": []}, 422, "inputs must not be an empty list"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, 422, "prompt_name"),
        ("/embed", {"inputs": "a", "truncation_direction": "left"}, 422, "truncation_direction"),
        ("/embed", {"inputs": ["a"] * 300}, 413, "at most 256"),
        ("/embed", {"inputs": "a " * 300, "truncate": False}, 422, "truncate is false"),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": [], "more": 1}},
            422,
            "known: source_sentence, sentences",
        ),
        ("/rerank", {"query": "a", "texts": ["b"]}, 422, "serves embeddings, not text-ranking"),
        ("/tokenize", {"inputs": [5]}, 422, "inputs[0] is an integer"),
    ],
)
def test_errors_have_their_shape(path: str, body: dict[str, Any], status: int, message: str) -> None:
    async def use(client: Client) -> None:
        answer = await client.post(path, json=body)
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "error_type"}
        assert answer.json()["error_type"] == "Validation"
        assert message in answer.json()["error"]

    with_client(use)


def test_info_tells_of_the_model_and_the_limits() -> None:
    async def encoder(client: Client) -> None:
        found = (await client.get("/info")).json()
        assert found["model_type"] == {"embedding": {"pooling": "mean"}}
        assert (found["max_input_length"], found["max_client_batch_size"]) == (256, 256)

    async def ranker(client: Client) -> None:
        assert list((await client.get("/info")).json()["model_type"]) == ["reranker"]

    with_client(encoder)
    with_client(ranker, **RANKER)


def score(query: str, text: str) -> float:
    return float(1 / (1 + np.exp(-fake_score(ids(f"{query} {text}")).astype(np.float64)[0])))


TEXTS = ["x", "y z", "w", "v u t"]


def test_texts_come_back_best_first() -> None:
    async def use(client: Client) -> None:
        plain = await client.post("/rerank", json={"query": "q", "texts": TEXTS, "return_text": True})
        raw = await client.post("/rerank", json={"query": "q", "texts": TEXTS, "raw_scores": True})
        expected = sorted(((score("q", text), -i) for i, text in enumerate(TEXTS)), reverse=True)

        assert [(-one["index"], one["score"], one["text"]) for one in plain.json()] == [
            (index, pytest.approx(value), TEXTS[-index]) for value, index in expected
        ]
        assert [one["index"] for one in raw.json()] == [one["index"] for one in plain.json()]
        assert raw.json()[0]["score"] == pytest.approx(float(fake_score(ids(f"q {TEXTS[raw.json()[0]['index']]}"))[0]))
        assert set(raw.json()[0]) == {"index", "score"}

    with_client(use, **RANKER)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_come_back_as_coheres_clients_read_them(path: str) -> None:
    async def use(client: Client) -> None:
        documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
        body = {"model": "ranker", "query": "q", "documents": documents, "top_n": 2, "return_documents": True}
        answer = (await client.post(path, json=body)).json()
        best = sorted(range(4), key=lambda i: -score("q", TEXTS[i]))[:2]

        assert [one["index"] for one in answer["results"]] == best
        assert [one["document"] for one in answer["results"]] == [{"text": TEXTS[i]} for i in best]
        assert answer["results"][0]["relevance_score"] == pytest.approx(score("q", TEXTS[best[0]]))
        assert answer["id"]
        assert answer["meta"]["api_version"] == {"version": "1"}
        assert answer["usage"]["total_tokens"] == sum(len(ids(f"q {text}")) for text in TEXTS)

        refused = await client.post(path, json={"query": "q", "documents": ["a"], "rank_fields": ["title"]})
        unknown = await client.post(path, json={"query": "q", "documents": ["a"], "model": "huge"})
        typed = await client.post(path, json={"query": "q", "documents": [{"title": "a"}]})
        assert (refused.status_code, set(refused.json())) == (422, {"message"})
        assert (unknown.status_code, unknown.json()["message"]) == (
            404,
            "the model 'huge' does not exist; served here: 'ranker'",
        )
        assert typed.status_code == 422

    with_client(use, **RANKER)


def test_a_cross_encoder_predicts_nothing_alone() -> None:
    async def use(client: Client) -> None:
        answer = await client.post("/predict", json={"inputs": "a"})
        assert answer.status_code == 422
        assert "call POST /rerank instead of /predict" in answer.json()["error"]["message"]

    with_client(use, **RANKER)

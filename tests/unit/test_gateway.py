"""Several models behind one address: real stages on the fake engine, in one process."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from deployments.engine.fake import fake_score, fake_token_id
from deployments.errors import ConfigError
from deployments.gateway import GatewayConfig, build
from deployments.protocols.open_inference import protobuf
from tests.support.grpc import CallContext
from tests.support.local import ManyModels, run_with_client

Client = httpx2.AsyncClient
ENCODER = {"model": {"engine": "fake", "name": "small"}}
OTHER = {"model": {"engine": "fake", "name": "large"}}
RANKER = {"model": {"engine": "fake", "name": "ranker", "task": "text-ranking"}}
CHAT = {"model": {"engine": "fake", "name": "chat", "task": "text-generation"}}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "slowlens"


def with_client(use: Callable[[Client, ManyModels], Awaitable[None]], **applications: Any) -> None:
    all_four = {"encoder": ENCODER, "other": OTHER, "ranker": RANKER, "llm": CHAT}
    run_with_client(lambda: ManyModels(**(applications or all_four)), use)


def score(query: str, text: str) -> float:
    ids = [1, *map(fake_token_id, f"{query} {text}".split()), 2]
    return float(1 / (1 + np.exp(-fake_score(ids).astype(np.float64)[0])))


def test_a_request_goes_to_the_model_that_its_body_names(store: Path) -> None:
    async def use(client: Client, many: ManyModels) -> None:
        await asyncio.gather(*(ready(client, name) for name in ("small", "large", "ranker", "chat")))
        small, large = [
            await client.post("/v1/embeddings", json={"input": "a b", "model": name}) for name in ("small", "large")
        ]
        ranked = await client.post("/v1/rerank", json={"query": "q", "documents": ["x", "y z"]})
        told = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})

        assert [answer.json()["model"] for answer in (small, large, ranked, told)] == [
            "small",
            "large",
            "ranker",
            "chat",
        ]
        found = {one["index"]: one["relevance_score"] for one in ranked.json()["results"]}
        assert found == pytest.approx({0: score("q", "x"), 1: score("q", "y z")})
        # Each went to the stages of its model.
        counts = {name: one.model.queue_state for name, one in many.applications.items() if name != "llm"}
        assert [await state() for state in counts.values()] == [{"waiting": 0, "running": 0, "oldest_age_ms": 0.0}] * 3

    with_client(use)
    models = [
        attribute["value"]["stringValue"]
        for path in store.glob("traces-*")
        for line in path.read_text().splitlines()
        for scope in json.loads(line)["resourceSpans"][0]["scopeSpans"]
        for span in scope["spans"]
        if span["name"] == "ai.inference.predict"
        for attribute in span["attributes"]
        if attribute["key"] == "ai.model.name"
    ]
    assert sorted(models) == ["chat", "large", "ranker", "small"]


async def ready(client: Client, model: str) -> None:
    while (await client.get(f"/v2/models/{model}/ready")).status_code != 200:
        await asyncio.sleep(0.001)


def test_a_request_that_names_no_model_goes_to_the_only_one_or_is_refused_with_all() -> None:
    async def use(client: Client, _: ManyModels) -> None:
        which = await client.post("/v1/embeddings", json={"input": "a"})
        unknown = await client.post("/v1/embeddings", json={"input": "a", "model": "huge"})
        misplaced = await client.post("/v1/embeddings", json={"input": "a", "model": "chat"})
        broken = await client.post("/v1/embeddings", content=b"{")

        assert (which.status_code, which.json()["error"]["param"]) == (422, "model")
        assert "model is required: 'small', 'large' serve this route" in which.json()["error"]["message"]
        assert "traceresponse" in which.headers
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"].endswith("served here: 'small', 'large', 'ranker', 'chat'")
        assert (misplaced.status_code, misplaced.json()["error"]["param"]) == (422, "model")
        assert (broken.status_code, broken.json()["error"]["code"]) == (422, "invalid_field")

    with_client(use)


def test_what_there_is_to_read_is_of_all_models() -> None:
    async def use(client: Client, _: ManyModels) -> None:
        await ready(client, "small")
        listed = (await client.get("/v1/models")).json()
        one = await client.get("/v1/models/large")
        none = await client.get("/v1/models/huge")
        described = (await client.get("/v2/models/ranker")).json()
        healthy = await client.get("/healthz")
        infos = (await client.get("/info")).json()["models"]

        assert [model["id"] for model in listed["data"]] == ["small", "large", "ranker", "chat"]
        assert (one.status_code, one.json()["id"], none.status_code) == (200, "large", 404)
        assert [tensor["name"] for tensor in described["inputs"]][:2] == ["query", "texts"]
        assert healthy.status_code == 200
        assert set(healthy.json()["models"]) == {"small", "large", "ranker", "chat"}
        assert [model["served_model_name"] for model in infos] == ["small", "large", "ranker", "chat"]
        assert "/v1/chat/completions" in (await client.get("/openapi.json")).json()["paths"]

    with_client(use)


def test_calls_over_grpc_go_to_their_model_too() -> None:
    request, _ = protobuf.METHODS["ModelInfer"]
    ready_request, _ = protobuf.METHODS["ModelReady"]

    async def use(client: Client, many: ManyModels) -> None:
        await ready(client, "large")
        sent = request(model_name="large", id="7")
        sent.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a b")
        answer = await many.gateway.ModelInfer(sent, CallContext())
        unknown = CallContext()
        await many.gateway.ModelInfer(request(model_name="huge"), unknown)

        assert (answer.model_name, answer.id) == ("large", "7")
        assert [output.name for output in answer.outputs] == ["embedding", "truncated"]
        assert (await many.gateway.ModelReady(ready_request(name="large"), CallContext())).ready
        assert unknown.details.startswith("model_not_found: the model 'huge' does not exist; served here: 'small'")

    with_client(use)


def test_a_key_of_one_application_does_not_open_another(tmp_path: Path) -> None:
    def keys(name: str) -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}]))
        return {"api_keys": str(path)}

    async def use(client: Client, _: ManyModels) -> None:
        async def post(key: str, model: str) -> int:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            body = {"input": "a", "model": model}
            return int((await client.post("/v1/embeddings", json=body, headers=headers)).status_code)

        assert [await post("k1", "small"), await post("k2", "large")] == [200, 200]
        assert [await post("k2", "small"), await post("", "small"), await post("k3", "large")] == [401, 401, 401]
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers={"authorization": "Bearer k2"})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200

    with_client(use, one={**ENCODER, "security": keys("k1")}, two={**OTHER, "security": keys("k2")})


def test_a_slow_body_is_told_within_its_time() -> None:
    async def slowly() -> Any:
        yield b'{"input": '
        await asyncio.sleep(3)
        yield b'"a"}'

    async def use(client: Client, many: ManyModels) -> None:
        answer = await raw(many.app, slowly())
        assert answer == 408

    limits = {"limits": {"body_timeout_ms": 50.0}}
    with_client(use, one={**ENCODER, **limits}, two={**OTHER, **limits})


async def raw(app: Any, body: Any) -> int:
    """Send a request whose body comes in pieces, and return its status."""
    statuses: list[int] = []
    iterator = aiter(body)

    async def receive() -> dict[str, Any]:
        try:
            return {"type": "http.request", "body": await anext(iterator), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "scheme": "http",
        "headers": [],
        "query_string": b"",
        "client": None,
    }
    await app(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize(
    ("applications", "message"),
    [
        ({}, "args.applications"),
        ({"a": {"modle": {}}}, "args.applications.a: "),
        ({"a": ENCODER, "b": ENCODER}, "a and b serve models of the same name, 'small'"),
    ],
)
def test_an_invalid_configuration_is_named(applications: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build({"applications": applications})
    assert message in str(refused.value)


def test_it_builds() -> None:
    assert build({"applications": {"a": ENCODER, "b": RANKER}})
    assert list(GatewayConfig.parse({"applications": {"a": ENCODER}}).parsed()) == ["a"]

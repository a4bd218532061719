"""The four stages in one process, on the fake engine: what a client gets, and what is traced."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.engine.fake import fake_embedding, fake_token_id
from deployments.telemetry import names
from deployments.telemetry.span_specs import SPANS
from tests.support.local import Application, run_with_client

ARGS: dict[str, Any] = {"model": {"engine": "fake", "name": "fake-model", "max_length": 16}}
Client = httpx2.AsyncClient
POISON = fake_token_id("poison")


def with_client(use: Callable[[Client, Application], Awaitable[None]], **args: Any) -> None:
    run_with_client(lambda: Application(**{**ARGS, **args}), use)


def test_an_embedding_comes_back_with_its_headers(tmp_path: Path) -> None:
    async def use(client: Client, _: Application) -> None:
        traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        headers = {"traceparent": traceparent, "x-request-id": "mine"}
        answer = await client.post("/v1/embeddings", json={"input": ["one two", "three"]}, headers=headers)
        body = answer.json()

        assert answer.status_code == 200
        assert [item["index"] for item in body["data"]] == [0, 1]
        ids = [1, fake_token_id("one"), fake_token_id("two"), 2]
        assert body["data"][0]["embedding"] == pytest.approx(fake_embedding(ids).tolist())
        assert body["usage"]["prompt_tokens"] == 7
        assert answer.headers["traceresponse"].startswith("00-" + "a" * 32)
        assert [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")] == [
            "validate",
            "tokenize",
            "queue",
            "forward",
            "postprocess",
            "transit",
            "total",
        ]

    with_client(use)
    lines = [line for path in (tmp_path / "slowlens").glob("traces-*") for line in path.read_text().splitlines()]
    spans = [s for line in lines for s in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    of_other_engines = {names.LOAD_DEVICE_MOVE, names.LOAD_WARM_UP}
    expected = {spec.name for spec in SPANS if spec.service != "autoscaler" and not spec.is_of_generations}
    # Nothing said when the request had reached what stands before the ingress.
    expected -= of_other_engines | {names.FRONT}
    assert {span["name"] for span in spans} == expected


def test_a_model_replica_that_has_stopped_is_not_warm(tmp_path: Path) -> None:
    async def use(client: Client, _: Application) -> None:
        await client.post("/v1/embeddings", json={"input": "a"})

    with_client(use)
    lines = [line for path in (tmp_path / "slowlens").glob("metrics-*") for line in path.read_text().splitlines()]
    found = [
        m
        for line in lines
        for r in json.loads(line)["resourceMetrics"]
        for s in r["scopeMetrics"]
        for m in s["metrics"]
    ]
    warm = [metric for metric in found if metric["name"] == "ai.model.replicas_warm"]
    (last,) = warm[-1]["gauge"]["dataPoints"]
    assert int(last["asInt"]) == 0


def test_token_ids_are_used_as_they_are_and_truncated() -> None:
    async def use(client: Client, _: Application) -> None:
        answer = await client.post("/v1/embeddings", json={"input": [[5, 6, 7], [8] * 20]})

        assert answer.json()["usage"]["prompt_tokens"] == 3 + 16
        refused = await client.post("/v1/embeddings", json={"input": [1, 30_000]})
        assert refused.json()["error"]["message"] == "input[0][1] must be a token id from 0 to 29999; got 30000"

    with_client(use)


def test_predict_says_what_was_truncated_or_refuses_it() -> None:
    async def use(client: Client, _: Application) -> None:
        answer = await client.post("/predict", json={"inputs": ["a " * 14, "a " * 15]})
        assert [prediction["truncated"] for prediction in answer.json()["predictions"]] == [False, True]
        refused = await client.post("/predict", json={"inputs": "a " * 15, "parameters": {"truncate": False}})
        assert refused.status_code == 422
        assert "inputs[0] is 17 tokens long; the model takes at most 16" in refused.json()["error"]["message"]

    with_client(use)


def test_one_bad_input_fails_alone() -> None:
    async def use(client: Client, _: Application) -> None:
        texts = ["good", "poison", "better", "best"]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": text}) for text in texts))

        assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
        error = answers[1].json()["error"]
        assert error["code"] == "model_failed"
        assert "the model failed on input[0] (ValueError)" in error["message"]
        assert answers[1].headers["traceresponse"].split("-")[1] in error["message"]

    with_client(use, model={**ARGS["model"], "fake": {"poison_token": POISON}})


def test_a_run_out_of_memory_is_halved() -> None:
    async def use(client: Client, application: Application) -> None:
        texts = [f"text {number}" for number in range(8)]
        answer = await client.post("/v1/embeddings", json={"input": texts})

        assert answer.status_code == 200
        assert len(answer.json()["data"]) == 8
        assert await application.model.queue_state() == {"waiting": 0, "running": 0, "oldest_age_ms": 0.0}

    with_client(use, model={**ARGS["model"], "fake": {"memory_tokens": 9}})


def test_requests_share_batches_and_get_their_own_results() -> None:
    async def use(client: Client, application: Application) -> None:
        texts = [f"word{number} and more" for number in range(20)]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": text}) for text in texts))

        for answer, text in zip(answers, texts, strict=True):
            ids = [1, *map(fake_token_id, text.split()), 2]
            assert answer.json()["data"][0]["embedding"] == pytest.approx(fake_embedding(ids).tolist())

    with_client(use)


@pytest.mark.parametrize(
    ("value", "status"), [("0", 422), ("soon", 422), ("1e9", 422), ("nan", 422), ("0.0001", 504), ("5000", 200)]
)
def test_deadlines(value: str, status: int) -> None:
    async def use(client: Client, _: Application) -> None:
        headers = {"x-request-timeout-ms": value}
        answer = await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
        assert answer.status_code == status

    with_client(use)


def test_a_deadline_that_passes_in_the_queue_is_504_before_the_model_runs() -> None:
    async def use(client: Client, _: Application) -> None:
        headers = {"x-request-timeout-ms": "20"}
        answer = await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)

        assert answer.status_code == 504
        assert "it was not run" in answer.json()["error"]["message"]

    with_client(use, model={**ARGS["model"], "fake": {"base_ms": 100}})


def test_a_full_queue_is_429_with_retry_after(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()

    async def use(client: Client, application: Application) -> None:
        first = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": "a"}))
        while (await application.model.queue_state())["running"] == 0:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": ["b", "c"]}))
        while (await application.model.queue_state())["waiting"] == 0:
            await asyncio.sleep(0.001)
        refused, again = [await client.post("/v1/embeddings", json={"input": "d"}) for _ in range(2)]
        hold.unlink()

        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert int(again.headers["retry-after"]) >= 2 * int(refused.headers["retry-after"]), "it came too early"
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]

    limits = {"max_inputs": 2}
    model = {**ARGS["model"], "fake": {"hold_path": str(hold)}}
    with_client(use, model=model, limits=limits, batching={"max_queue": 2})


def test_a_full_queue_is_told_before_the_body_is_read(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    unread = b"x" * 100_000

    async def use(client: Client, application: Application) -> None:
        held = []
        for letter, state in (("a", "running"), ("b", "waiting"), ("c", "waiting")):
            held.append(asyncio.ensure_future(client.post("/v1/embeddings", json={"input": letter})))
            while (await application.model.queue_state())[state] < max(1, len(held) - 1):
                await asyncio.sleep(0.001)
        # A reply, or the answer to a ping, tells the ingress that the queue is full.
        while (refused := await client.post("/v1/embeddings", content=unread)).status_code != 429:
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")
            await asyncio.sleep(0.01)
        hold.unlink()

        assert refused.json()["error"]["message"] == "the queue of every replica of the model is full; try again later"
        assert refused.headers["connection"] == "close"
        assert [(await answer).status_code for answer in held] == [200, 200, 200]

    model = {**ARGS["model"], "fake": {"hold_path": str(hold)}}
    with_client(use, model=model, limits={"max_inputs": 2}, batching={"max_queue": 2, "max_batch_size": 1})


def test_a_long_text_whose_deadline_has_passed_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.engine.fake import FakeTokenizer

    encode, encoded, goes_on = FakeTokenizer.encode, list[str](), threading.Event()

    def slow(self: FakeTokenizer, texts: Any, *, with_offsets: bool) -> Any:
        encoded.extend(text[0] for text in texts)
        goes_on.wait(10)
        return encode(self, texts, with_offsets=with_offsets)

    monkeypatch.setattr(FakeTokenizer, "encode", slow)

    async def use(client: Client, _: Application) -> None:
        async def post(letter: str, timeout_ms: str) -> int:
            headers = {"X-Request-Timeout-Ms": timeout_ms}
            body = {"input": f"{letter} " * 3000}
            return int((await client.post("/v1/embeddings", json=body, headers=headers)).status_code)

        held = [asyncio.ensure_future(post(letter, "20000")) for letter in "ab"]
        while len(encoded) < 2:
            await asyncio.sleep(0.001)
        assert await post("c", "50") == 504
        goes_on.set()
        assert [await answer for answer in held] == [200, 200]
        assert await post("d", "20000") == 200
        assert sorted(encoded) == ["a", "b", "d"]

    with_client(use)


def test_all_inputs_together_are_limited() -> None:
    async def use(client: Client, _: Application) -> None:
        for body in ({"input": ["a" * 60, "b" * 41]}, {"input": [[1] * 60, [2] * 41]}):
            refused = await client.post("/v1/embeddings", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (413, "input")
            assert "input has 101 characters or token ids in all; at most 100" in refused.json()["error"]["message"]
        assert (await client.post("/v1/embeddings", json={"input": ["a" * 60, "b" * 40]})).status_code == 200

    with_client(use, limits={"max_request_chars": 100})


KEYS = [{"name": name, "sha256": hashlib.sha256(f"{name}-secret".encode()).hexdigest()} for name in ("big", "small")]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps(KEYS))
    return str(path)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-secret"}


def test_a_key_is_needed_for_all_but_health(keys: str, tmp_path: Path) -> None:
    async def use(client: Client, _: Application) -> None:
        for headers in ({}, bearer("other")):
            for method, path in (
                ("POST", "/v1/embeddings"),
                ("POST", "/predict"),
                ("GET", "/v1/models"),
                ("GET", "/docs"),
            ):
                # Whatever the body is: it is not read.
                refused = await client.request(method, path, headers=headers, content=b"{")
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/v1/models", headers=bearer("big"))).status_code == 200
        answer = await client.post("/v1/embeddings", json={"input": "a"}, headers=bearer("small"))
        assert answer.status_code == 200
        assert (await client.get("/healthz")).status_code == 200

    with_client(use, security={"api_keys": keys}, telemetry={"directory": str(tmp_path)})
    lines = [json.loads(line) for file in tmp_path.glob("traces*") for line in file.read_text().splitlines()]
    text = json.dumps(lines)
    tenants = [
        attribute["value"]["stringValue"]
        for line in lines
        for resource in line["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
        for attribute in span["attributes"]
        if attribute["key"] == "ai.tenant"
    ]
    assert tenants == ["small"]
    assert "secret" not in text


def test_a_tenant_does_not_learn_what_another_has_tokenized(keys: str, tmp_path: Path) -> None:
    async def use(client: Client, _: Application) -> None:
        for name in ("small", "big", "small"):
            answer = await client.post("/v1/embeddings", json={"input": "a secret"}, headers=bearer(name))
            assert answer.status_code == 200

    with_client(use, security={"api_keys": keys}, telemetry={"directory": str(tmp_path)})
    hits = [
        attribute["value"]["intValue"]
        for file in tmp_path.glob("traces*")
        for line in file.read_text().splitlines()
        for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]
        for attribute in span["attributes"]
        if attribute["key"] == "ai.preprocess.cache_hits"
    ]
    assert hits == ["0", "0", "1"]


def test_a_tenant_that_floods_leaves_the_others_their_place(keys: str, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    done: list[str] = []

    async def use(client: Client, application: Application) -> None:
        async def post(name: str, text: str) -> int:
            answer = await client.post("/v1/embeddings", json={"input": text}, headers=bearer(name))
            done.append(f"{name} {answer.status_code}")
            return int(answer.status_code)

        first = asyncio.ensure_future(post("big", "a"))
        while (await application.model.queue_state())["running"] == 0:
            await asyncio.sleep(0.001)
        flood = [asyncio.ensure_future(post("big", f"text {number}")) for number in range(60)]
        while done.count("big 429") < 40:
            await asyncio.sleep(0.001)
        small = [asyncio.ensure_future(post("small", f"other {number}")) for number in range(4)]
        while (await application.model.queue_state())["waiting"] < 24:
            await asyncio.sleep(0.001)
        hold.unlink()
        assert [await answer for answer in small] == [200] * 4
        await asyncio.gather(first, *flood)

    model = {**ARGS["model"], "fake": {"hold_path": str(hold)}}
    with_client(
        use,
        model=model,
        security={"api_keys": keys},
        limits={"max_inputs": 2},
        batching={"max_queue": 40, "max_batch_size": 1},
    )
    answered = [one for one in done if one.endswith("200")]
    # Half of the queue was left to others, and theirs were served in turn with those that had come before.
    assert done.count("big 429") == 40
    assert answered.index("small 200") <= 3
    assert max(number for number, one in enumerate(answered) if one == "small 200") <= 10


def test_a_cancelled_request_leaves_the_queue(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()

    async def use(client: Client, application: Application) -> None:
        async def waiting() -> float:
            return float((await application.model.queue_state())["waiting"])

        first = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": "a"}))
        while (await application.model.queue_state())["running"] == 0:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(client.post("/v1/embeddings", json={"input": text})) for text in "bc"]
        while await waiting() < 2:
            await asyncio.sleep(0.001)
        others[0].cancel()
        while await waiting() > 1:
            await asyncio.sleep(0.001)
        hold.unlink()

        assert (await first).status_code == 200
        assert (await others[1]).status_code == 200

    with_client(use, model={**ARGS["model"], "fake": {"hold_path": str(hold)}})


def test_a_broken_tokenizer_fails_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.engine.fake import FakeTokenizer

    encode = FakeTokenizer.encode

    def broken(self: FakeTokenizer, texts: Any, *, with_offsets: bool) -> Any:
        if "broken" in texts:
            raise ValueError("secret")
        return encode(self, texts, with_offsets=with_offsets)

    monkeypatch.setattr(FakeTokenizer, "encode", broken)

    async def use(client: Client, _: Application) -> None:
        texts = ["good", "broken", "better"]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": text}) for text in texts))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "secret" not in answers[1].text

    with_client(use)


def test_long_texts_are_tokenized_in_a_thread_and_short_ones_cached() -> None:
    async def use(client: Client, application: Application) -> None:
        for _ in range(2):
            await client.post("/v1/embeddings", json={"input": ["short", "word " * 2000]})
        assert (await application.tokenizer.record_autoscaling_stats())["throughput"] > 0

    with_client(use, tokenizer={"cache_entries": 1})


def test_the_models_are_listed() -> None:
    async def use(client: Client, _: Application) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed == {
            "object": "list",
            "data": [{"id": "fake-model", "object": "model", "created": 7, "owned_by": "slowlens"}],
        }
        assert (await client.get("/v1/models/fake-model")).json() == listed["data"][0]
        unknown = await client.get("/v1/models/other")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        schema = (await client.get("/openapi.json")).json()
        assert {"/v1/embeddings", "/predict", "/healthz"} <= schema["paths"].keys()

    with_client(use)


def test_health_is_whether_every_stage_has_a_replica() -> None:
    async def use(client: Client, application: Application) -> None:
        while (await client.get("/healthz")).status_code != 200:
            await asyncio.sleep(0.001)
        await application.model.close()
        while (answer := await client.get("/healthz")).status_code != 503:
            await asyncio.sleep(0.001)
        assert answer.json()["error"]["message"] == "no replica is ready: model"

    with_client(use)


def test_every_stage_reports_to_the_autoscaling_policy() -> None:
    async def use(client: Client, application: Application) -> None:
        await client.post("/v1/embeddings", json={"input": "a"})
        stages: list[Any] = [application.ingress, *application.stages.values()]
        reports = [await stage.record_autoscaling_stats() for stage in stages]

        assert all(report["demand"] >= 0 and report["start_ms"] >= 0 for report in reports)
        assert reports[0]["queue_depth"] == 0
        await application.model.check_health()

    with_client(use)

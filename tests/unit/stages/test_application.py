"""The four stages in one process, on the fake engine: what a client gets, and what is traced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.engine.fake import fake_embedding, fake_token_id
from deployments.telemetry import names
from deployments.telemetry.span_specs import SPANS
from tests.support.local import Application

ARGS: dict[str, Any] = {"model": {"engine": "fake", "name": "fake-model", "max_length": 16}}
Client = httpx2.AsyncClient
POISON = fake_token_id("poison")


def with_client(use: Callable[[Client, Application], Awaitable[None]], **args: Any) -> Application:
    """Run ``use`` with a client of a fresh application, and close the application's telemetry."""
    application = Application(**{**ARGS, **args})

    async def run() -> None:
        transport = httpx2.ASGITransport(application.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            await use(client, application)

    asyncio.run(run())
    application.close()
    return application


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
    expected = {spec.name for spec in SPANS if spec.service != "autoscaler"} - of_other_engines
    assert {span["name"] for span in spans} == expected


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
        assert await application.model_stage.queue_state() == {"waiting": 0, "running": 0, "oldest_age_ms": 0.0}

    with_client(use, model={**ARGS["model"], "fake": {"memory_tokens": 9}})


def test_requests_share_calls_and_batches_and_get_their_own_results() -> None:
    async def use(client: Client, application: Application) -> None:
        texts = [f"word{number} and more" for number in range(20)]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": text}) for text in texts))

        for answer, text in zip(answers, texts, strict=True):
            ids = [1, *map(fake_token_id, text.split()), 2]
            assert answer.json()["data"][0]["embedding"] == pytest.approx(fake_embedding(ids).tolist())
        assert len(application.tokenizer.calls) < len(texts)

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
        while (await application.model_stage.queue_state())["running"] == 0:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": ["b", "c"]}))
        while (await application.model_stage.queue_state())["waiting"] == 0:
            await asyncio.sleep(0.001)
        refused = await client.post("/v1/embeddings", json={"input": "d"})
        hold.unlink()

        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]

    limits = {"max_inputs": 2}
    model = {**ARGS["model"], "fake": {"hold_path": str(hold)}}
    with_client(use, model=model, limits=limits, batching={"max_queue": 2})


def test_a_cancelled_request_leaves_the_queue(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()

    async def use(client: Client, application: Application) -> None:
        async def waiting() -> float:
            return (await application.model_stage.queue_state())["waiting"]

        first = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": "a"}))
        while (await application.model_stage.queue_state())["running"] == 0:
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


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ActorDiedError(), 503, "replica_died"),
        (DeploymentUnavailableError(None), 503, "no_replica_ready"),  # type: ignore[arg-type]
        (BackPressureError(num_queued_requests=7, max_queued_requests=7), 429, "queue_full"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
def test_failures_of_a_call_have_our_shape(error: Exception, status: int, code: str) -> None:
    async def use(client: Client, application: Application) -> None:
        application.postprocessor.error = error
        answer = await client.post("/v1/embeddings", json={"input": "a"})

        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "secret" not in answer.text

    with_client(use)


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
        assert (await application.tokenizer.stage.record_autoscaling_stats())["throughput"] > 0

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


@pytest.mark.parametrize(
    ("running", "status", "message"),
    [
        ({"Tokenizer": 1, "Model": 1, "Postprocessor": 1}, 200, ""),
        ({"Tokenizer": 1, "Postprocessor": 1}, 503, "no replica is ready: model"),
        (None, 503, "controller"),
    ],
)
def test_health_is_what_the_controller_says(
    monkeypatch: pytest.MonkeyPatch, running: dict[str, int] | None, status: int, message: str
) -> None:
    def ask(_: str) -> dict[str, int]:
        if running is None:
            raise RuntimeError("no controller")
        return running

    monkeypatch.setattr("deployments.stages.ingress.running_replicas", ask)

    async def use(client: Client, _: Application) -> None:
        answer = await client.get("/healthz")
        assert answer.status_code == status
        assert message in answer.text

    with_client(use)


def test_every_stage_reports_to_the_autoscaling_policy() -> None:
    async def use(client: Client, application: Application) -> None:
        await client.post("/v1/embeddings", json={"input": "a"})
        stages: list[Any] = [application.ingress, *(h.stage for h in application.handles)]
        reports = [await stage.record_autoscaling_stats() for stage in stages]

        assert all(report["demand"] >= 0 and report["start_ms"] >= 0 for report in reports)
        assert reports[0]["queue_depth"] == 0
        await application.model_stage.check_health()

    with_client(use)

"""The four stages of a language model in one process, on the fake engine: what a client gets, and what is traced."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.engine.fake import FakeTextTokenizer, fake_token_id
from deployments.engine.generation.fake import FakeGenerator, fake_continuation
from deployments.explain.requests.breakdown import break_down
from deployments.explain.traces.files import TraceFiles
from deployments.messages import ChatMessage
from deployments.telemetry import names
from deployments.transport.server import Chunks
from tests.support.local import GenerationApplication, run_with_client

Client = httpx2.AsyncClient
TOKENIZER = FakeTextTokenizer()


def with_client(use: Callable[[Client, GenerationApplication], Awaitable[None]], **args: Any) -> None:
    model = {"engine": "fake", "task": "text-generation", "name": "lm", **args.pop("model", {})}
    run_with_client(lambda: GenerationApplication(model=model, **args), use)


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **more}


def expected(content: str, tokens: int = 8, seed: int = 0) -> str:
    prompt = TOKENIZER.render([ChatMessage("user", content)])
    return TOKENIZER.decode(fake_continuation(prompt.tolist(), tokens, seed))


def events(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def spans(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in (folder / "slowlens").glob("traces-*") for line in path.read_text().splitlines()]
    return [
        {**span, "attributes": {a["key"]: next(iter(a["value"].values()), None) for a in span["attributes"]}}
        for line in lines
        for resource in json.loads(line)["resourceSpans"]
        for span in resource["scopeSpans"][0]["spans"]
    ]


def of(name: str, folder: Path) -> list[dict[str, Any]]:
    return [span for span in spans(folder) if span["name"] == name]


def test_an_answer_in_whole() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        answer = await client.post("/v1/chat/completions", json=chat("hello there"))
        body = answer.json()
        assert answer.status_code == 200
        assert body["choices"][0]["message"]["content"] == expected("hello there")
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 8
        assert body["usage"]["prompt_tokens"] == 4
        assert [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")] == [
            "validate",
            "tokenize",
            "queue",
            "prefill",
            "transit",
            "decode",
            "total",
        ]
        *parts, total = [float(part.partition("dur=")[2]) for part in answer.headers["server-timing"].split(", ")]
        assert sum(parts) == pytest.approx(total, rel=0.05, abs=1)

    with_client(use)


def test_a_streamed_answer() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        body = chat("hello there", stream=True, stream_options={"include_usage": True})
        answer = await client.post("/v1/chat/completions", json=body)
        *chunks, usage, done = events(answer.text)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert done == "[DONE]"
        assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 8
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == expected("hello there")
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        timing = answer.headers["server-timing"]
        assert "prefill;dur=" in timing
        assert "total" not in timing

    with_client(use)


def test_the_end_of_a_text_is_not_part_of_it() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        body = (await client.post("/v1/completions", json={"prompt": "the end", "temperature": 0})).json()
        prompt = TOKENIZER.encode("the end").tolist()
        assert body["choices"][0]["text"] == TOKENIZER.decode(fake_continuation(prompt, 5))
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == 6

    with_client(use)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_stop_string_ends_the_generation(tmp_path: Path, is_streamed: bool) -> None:
    words = expected("hello", 100).split()

    async def use(client: Client, application: GenerationApplication) -> None:
        body = chat("hello", max_tokens=100, stop=["never", f"{words[2]} {words[3]}"], stream=is_streamed)
        answer = await client.post("/v1/chat/completions", json=body)
        if is_streamed:
            chunks = [event["choices"][0] for event in events(answer.text)[:-1]]
            text, reason = "".join(c["delta"].get("content", "") for c in chunks), chunks[-1]["finish_reason"]
        else:
            choice = answer.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert text == f" {words[0]} {words[1]} "
        assert reason == "stop"
        if not is_streamed:
            assert answer.json()["usage"]["completion_tokens"] == 4

    with_client(use, model={"fake": {"base_ms": 5}})
    (generate,) = of(names.GENERATE, tmp_path)
    assert generate["status"].get("code", 0) == 0
    (decode,) = of(names.DECODE, tmp_path)
    assert int(decode["attributes"]["ai.decode.tokens"]) < 20


def test_choices_and_seeds_are_independent_of_company() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        async def ask(seed: int, n: int) -> list[str]:
            body = chat("hello", seed=seed, n=n, temperature=1)
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            return [choice["message"]["content"] for choice in answer["choices"]]

        (alone,) = await ask(7, 1)
        assert alone == expected("hello", seed=7)
        in_company = await asyncio.gather(*[ask(seed, 2) for seed in range(5, 15)])
        assert in_company[2] == [expected("hello", seed=7), expected("hello", seed=8)]

    with_client(use)


def test_log_probabilities() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        body = chat("hello", logprobs=True, top_logprobs=2, max_tokens=3)
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        content = choice["logprobs"]["content"]
        assert "".join(one["token"] for one in content) == choice["message"]["content"]
        assert [len(one["top_logprobs"]) for one in content] == [2, 2, 2]

    with_client(use)


def test_many_at_once_each_get_their_own() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        async def ask(number: int) -> None:
            content, tokens = f"question {number}", 3 + number % 20
            body = chat(content, max_tokens=tokens, stream=bool(number % 2))
            answer = await client.post("/v1/chat/completions", json=body)
            if number % 2:
                chunks = events(answer.text)[:-1]
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            else:
                text = answer.json()["choices"][0]["message"]["content"]
            assert text == expected(content, tokens)

        await asyncio.gather(*map(ask, range(60)))

    with_client(use, generation={"max_sequences": 8, "kv_cache_tokens": 256, "kv_reserve": 0.0})


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, 422, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 300}]}, 422, "messages"),
        ("/v1/chat/completions", chat("a", max_tokens=1000), 422, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "model": "x"}, 404, "model"),
        ("/v1/completions", b"{", 400, None),
    ],
)
def test_what_can_never_run_is_refused(path: str, body: Any, status: int, param: str | None) -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post(path, content=raw)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        assert answer.headers["traceresponse"]
        assert answer.headers["server-timing"].startswith("validate;dur=")

    with_client(use)


def test_what_the_cache_can_never_hold_is_refused() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        answer = await client.post("/v1/chat/completions", json=chat("a", max_tokens=100))
        assert answer.status_code == 422
        assert "KV cache, which holds 64" in answer.json()["error"]["message"]

    with_client(use, generation={"kv_cache_tokens": 64})


def test_a_full_queue_is_429_with_a_time_to_wait(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()

    async def use(client: Client, application: GenerationApplication) -> None:
        first = [asyncio.ensure_future(client.post("/v1/chat/completions", json=chat(f"q{i}"))) for i in range(4)]
        await until(lambda: pending(application) == 4)
        refused = await client.post("/v1/chat/completions", json=chat("late"))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        gate.unlink()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200] * 4

    generation = {"max_sequences": 1, "max_queue": 4}
    with_client(use, generation=generation, model={"fake": {"hold_path": str(gate)}})


def pending(application: GenerationApplication) -> int:
    model: Any = application.model
    return int(model.pending)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_whoever_leaves_frees_the_cache() -> None:
    async def use(client: Client, application: GenerationApplication) -> None:
        asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat("a", max_tokens=200)))
        await until(lambda: pending(application) == 1)
        asking.cancel()
        await until(lambda: pending(application) == 0)
        model: Any = application.model
        await until(lambda: not model.cache.held)
        # Others are not harmed.
        answer = await client.post("/v1/chat/completions", json=chat("hello"))
        assert answer.json()["choices"][0]["message"]["content"] == expected("hello")

    with_client(use, model={"fake": {"base_ms": 10}})


def test_a_deadline_is_504_before_the_first_token_and_an_event_after_it() -> None:
    async def use(client: Client, application: GenerationApplication) -> None:
        late = {"x-request-timeout-ms": "150"}
        whole = await client.post("/v1/chat/completions", json=chat("a", max_tokens=200), headers=late)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_passed")
        body = chat("a", max_tokens=200, stream=True)
        streamed = await client.post("/v1/chat/completions", json=body, headers=late)
        assert streamed.status_code == 200
        *chunks, last = events(streamed.text)
        assert chunks
        assert last["error"]["code"] == "deadline_passed"
        model: Any = application.model
        await until(lambda: not model.cache.held)

    with_client(use, model={"fake": {"base_ms": 10}})


def test_a_request_that_the_model_fails_on_fails_alone(tmp_path: Path) -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        bodies = [chat(f"q{i}", max_tokens=20) for i in range(3)] + [chat("some poison")]
        answers = await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for body in bodies])
        assert [answer.status_code for answer in answers] == [200, 200, 200, 500]
        assert answers[3].json()["error"]["code"] == "model_failed"
        for i, answer in enumerate(answers[:3]):
            assert answer.json()["choices"][0]["message"]["content"] == expected(f"q{i}", 20)

    with_client(use, model={"fake": {"base_ms": 5, "poison_token": fake_token_id("poison")}})


def test_one_trace_with_its_segments(tmp_path: Path) -> None:
    traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"

    async def use(client: Client, _: GenerationApplication) -> None:
        body = chat("hello there", stream=True, n=2)
        await client.post("/v1/chat/completions", json=body, headers={"traceparent": traceparent})

    with_client(use, model={"fake": {"base_ms": 2}})
    own = [span for span in spans(tmp_path) if span["traceId"] == "a" * 32]
    by_id = {span["spanId"]: span for span in own}
    tree = sorted((span["name"], by_id[span["parentSpanId"]]["name"]) for span in own if span["parentSpanId"] in by_id)
    assert tree == [
        (names.HOP_MODEL, names.PREDICT),
        (names.HOP_TOKENIZER, names.PREDICT),
        (names.DECODE, names.GENERATE),
        (names.DECODE, names.GENERATE),
        (names.GENERATE, names.HOP_MODEL),
        (names.GENERATE, names.HOP_MODEL),
        (names.PREFILL, names.GENERATE),
        (names.PREFILL, names.GENERATE),
        (names.PREPROCESS, names.HOP_TOKENIZER),
        (names.QUEUE, names.GENERATE),
        (names.QUEUE, names.GENERATE),
        (names.STREAM, names.PREDICT),
        (names.VALIDATE, names.PREDICT),
    ]
    generates = {span["spanId"] for span in own if span["name"] == names.GENERATE}
    segments = of(names.SEGMENT, tmp_path)
    linked = {link["spanId"] for span in own if span["name"] in (names.PREFILL, names.DECODE) for link in span["links"]}
    assert linked == {segment["spanId"] for segment in segments}
    for segment in segments:
        assert {link["spanId"] for link in segment["links"]} <= generates
    # Two prompts, then both decode with the same members in the same roles.
    total = sum(int(segment["attributes"]["ai.segment.steps"]) for segment in segments)
    assert len(segments) <= 4 < total
    (root,) = (span for span in own if span["name"] == names.PREDICT)
    assert root["attributes"][names.GEN_AI_USAGE_OUTPUT_TOKENS] == "16"
    assert root["attributes"][names.GEN_AI_OPERATION_NAME] == "chat"
    assert root["attributes"][names.GEN_AI_RESPONSE_ID].startswith("chatcmpl-")


def test_a_preemption_is_seen(tmp_path: Path) -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        bodies = [chat(f"q{i}", max_tokens=60) for i in range(3)]
        await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for body in bodies])

    with_client(use, generation={"kv_cache_tokens": 128, "kv_reserve": 0.0})
    preempted = of(names.PREEMPTED, tmp_path)
    assert preempted
    assert all(int(span["endTimeUnixNano"]) > int(span["startTimeUnixNano"]) for span in preempted)


def test_waiting_for_the_cache_is_stated(tmp_path: Path) -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        bodies = [chat(f"q{i}", max_tokens=40) for i in range(3)]
        await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for body in bodies])

    with_client(use, generation={"kv_cache_tokens": 64}, model={"fake": {"base_ms": 2}})
    waits = sorted(float(span["attributes"]["ai.queue.cache_wait_ms"]) for span in of(names.QUEUE, tmp_path))
    assert waits[0] == 0
    assert waits[2] > waits[1] > 60


def test_a_reader_that_is_slow_is_seen_as_one(tmp_path: Path) -> None:
    async def use(_: Client, application: GenerationApplication) -> None:
        body = json.dumps(chat("hello", stream=True, max_tokens=20)).encode()
        sent: list[dict[str, Any]] = []
        requests = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await never.wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.sleep(0.05)

        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "scheme": "http",
            "headers": [],
            "query_string": b"",
        }
        began = time.monotonic()
        await application.app(scope, receive, send)
        assert time.monotonic() - began > 0.1
        text = b"".join(message.get("body", b"") for message in sent).decode()
        chunks = events(text)[:-1]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected("hello", 20)
        # What came meanwhile was sent together.
        assert len(sent) < 15

    with_client(use)
    (stream,), (root,), (hop,) = (of(name, tmp_path) for name in (names.STREAM, names.PREDICT, names.HOP_MODEL))
    assert float(stream["attributes"]["ai.stream.blocked_ms"]) > 90
    assert int(root["endTimeUnixNano"]) >= int(stream["endTimeUnixNano"]) > int(hop["endTimeUnixNano"])
    source = TraceFiles(tmp_path / "slowlens")
    account = break_down(source.trace(source.newest()))
    assert account.slow_reader > 50e6
    assert account.unaccounted < 0.1 * account.latency_ns


def test_the_api_is_described() -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        document = (await client.get("/openapi.json")).json()
        assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(document["paths"])
        body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"messages", "stream_options", "max_completion_tokens"} <= set(body["properties"])
        assert "$ref" not in json.dumps(body)

    with_client(use)


def test_a_choice_that_was_stopped_takes_no_more_part(tmp_path: Path) -> None:
    words = [expected("hello", 60, seed).split() for seed in (7, 8)]

    async def use(client: Client, _: GenerationApplication) -> None:
        body = chat("hello", n=2, seed=7, temperature=1, max_tokens=60, stop=[words[0][3]], logprobs=True)
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        first, second = answer["choices"]
        assert [choice["finish_reason"] for choice in (first, second)] == ["stop", "length"]
        assert first["message"]["content"].split() == words[0][:3]
        assert second["message"]["content"].split() == words[1]
        # Nothing of the stop string, but the space before it.
        assert [one["token"].strip() for one in first["logprobs"]["content"]] == words[0][:3]
        assert answer["usage"]["completion_tokens"] == 4 + 60

    with_client(use, model={"fake": {"base_ms": 2}})
    tokens = sorted(int(span["attributes"]["ai.decode.tokens"]) for span in of(names.DECODE, tmp_path))
    assert tokens[0] < 30
    assert tokens[1] == 60
    assert all(span["status"].get("code", 0) == 0 for span in of(names.GENERATE, tmp_path))


def test_further_choices_wait_until_the_prompt_is_in_the_cache(tmp_path: Path) -> None:
    content = "many words " * 60

    async def use(client: Client, _: GenerationApplication) -> None:
        answer = (await client.post("/v1/chat/completions", json=chat(content, n=3, max_tokens=5))).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == [expected(content, 5)] * 3

    # Four steps for the prompt.
    with_client(use, model={"fake": {"base_ms": 25}}, generation={"max_batch_tokens": 32, "max_sequences": 8})
    first, *others = sorted(of(names.PREFILL, tmp_path), key=lambda span: int(span["startTimeUnixNano"]))
    assert all(int(span["startTimeUnixNano"]) >= int(first["endTimeUnixNano"]) for span in others)
    # Their queue does not contain the prefill of the first, only the step that had begun.
    queues = sorted(int(s["endTimeUnixNano"]) - int(s["startTimeUnixNano"]) for s in of(names.QUEUE, tmp_path))
    assert queues[-1] < 60e6
    source = TraceFiles(tmp_path / "slowlens")
    account = break_down(source.trace(source.newest()))
    assert account.prefill > 95e6
    assert account.device_busy < 60e6


def test_when_the_device_is_lost_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(client: Client, application: GenerationApplication) -> None:
        model: Any = application.model

        def broken(self: FakeGenerator, members: object) -> object:
            self.broken = "the device is gone"
            time.sleep(0.05)
            raise RuntimeError("gone")

        monkeypatch.setattr(FakeGenerator, "step", broken)
        bodies = [chat(f"q{i}") for i in range(3)]
        first = asyncio.ensure_future(client.post("/v1/chat/completions", json=bodies[0]))
        await until(lambda: pending(application) == 1)
        # The step has begun, or is about to; these wait behind it.
        answers = await asyncio.gather(first, *[client.post("/v1/chat/completions", json=body) for body in bodies[1:]])
        assert [answer.status_code for answer in answers] == [503] * 3
        assert all(answer.headers["retry-after"] == "5" for answer in answers)
        with pytest.raises(RuntimeError, match="the device can no longer be used"):
            await model.check_health()

    with_client(use)


def test_the_last_tokens_arrive_however_slowly_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(client: Client, _: GenerationApplication) -> None:
        body = chat("hello", stream=True, max_tokens=200)
        answer = await client.post("/v1/chat/completions", json=body)
        chunks = events(answer.text)[:-1]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected("hello", 200)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    send = Chunks.send

    async def late(self: Chunks, chunk: Any) -> None:
        await asyncio.sleep(0.02)
        await send(self, chunk)

    monkeypatch.setattr(Chunks, "send", late)
    with_client(use)

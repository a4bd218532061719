"""Request bodies: accepted values, and errors that name the field and the rule."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.config import LimitsConfig, ModelConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, InvalidField, InvalidJson, ModelNotFound, TooLarge
from deployments.messages import OutputOptions, Postprocessed, Ragged, Tokenized
from deployments.protocols.fields import Answered, ParsedRequest
from deployments.protocols.openai import frame_embeddings, frame_predict, parse_embeddings, parse_predict

CARD = ModelCard.load(ModelConfig(engine="fake"))
LIMITS = LimitsConfig(max_inputs=4, max_input_chars=100)


def card(**changes: Any) -> ModelCard:
    from dataclasses import replace

    return replace(CARD, **changes)


def refused(body: Any, parse: Any = parse_embeddings, of: ModelCard = CARD) -> ApiError:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as raised:
        parse(encoded, of, LIMITS)
    return raised.value


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("text", ("text",)),
        (["a", "b"], ("a", "b")),
        ([5, 6], ((5, 6),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
    ],
)
def test_all_input_types(given: Any, inputs: tuple[Any, ...]) -> None:
    parsed = parse_embeddings(json.dumps({"input": given}).encode(), CARD, LIMITS)

    assert (parsed.inputs, parsed.param, parsed.truncate, parsed.model) == (inputs, "input", True, CARD.name)
    assert parsed.options == OutputOptions("/v1/embeddings")
    assert parsed.texts == tuple(value for value in inputs if isinstance(value, str))


def test_embeddings_options() -> None:
    body = {"input": "a", "model": CARD.name, "encoding_format": "base64", "dimensions": 2, "user": "u"}

    assert parse_embeddings(json.dumps(body).encode(), CARD, LIMITS).options == OutputOptions(
        "/v1/embeddings", dimensions=2, base64=True
    )


def test_predict_options() -> None:
    body = {"inputs": ["a", "b"], "parameters": {"truncate": False, "top_k": 3}}
    parsed = parse_predict(json.dumps(body).encode(), CARD, LIMITS)

    assert (parsed.inputs, parsed.truncate, parsed.options) == (("a", "b"), False, OutputOptions("/predict", top_k=3))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "input is required"),
        ({"input": ""}, "input", "input[0] must not be an empty string"),
        ({"input": []}, "input", "input must not be an empty list"),
        ({"input": None}, "input", "input must be a string or a list of strings"),
        ({"input": 7}, "input", "got an integer"),
        ({"input": True}, "input", "got a boolean"),
        ({"input": 1.5}, "input", "got a number"),
        ({"input": {"text": "a"}}, "input", "got an object"),
        ({"input": ["a", 1]}, "input", "input[1] is an integer"),
        ({"input": ["a", ["b"]]}, "input", "input[1] is a list"),
        ({"input": ["a", None]}, "input", "input[1] is null"),
        ({"input": [[]]}, "input", "input[0] must be a non-empty list of token ids"),
        ({"input": [[1], "a"]}, "input", "input[1] must be a non-empty list of token ids; got a string"),
        ({"input": [[1, True]]}, "input", "input[0][1] must be a token id; got a boolean"),
        ({"input": [1, "a"]}, "input", "input[0][1] must be a token id; got a string"),
        ({"input": [1] * 101}, "input", "input[0] has 101 token ids; at most 100 are allowed"),
        ({"input": [-1]}, "input", "input[0][0] must be a token id of the vocabulary; got -1"),
        ({"input": [10**30]}, "input", "must be a token id of the vocabulary"),
        ({"input": "x" * 101}, "input", "input[0] has 101 characters; at most 100 are allowed"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 5}, "dimensions", "dimensions must be at most 4"),
        ({"input": "a", "dimensions": "2"}, "dimensions", "valid integer"),
        ({"input": "a", "model": 3}, "model", "valid string"),
        ({"input": "a", "inputs": "b"}, "inputs", "inputs is not a field of this request; known: input, model"),
        ({"input": "a", "k" * 999: 1}, "k" * 80, "k is not a field of this request"),
        (["a"], None, "the body must be a JSON object; got a list"),
    ],
)
def test_an_invalid_embeddings_field_is_named_with_its_rule(body: Any, param: str | None, message: str) -> None:
    error = refused(body)

    assert isinstance(error, InvalidField)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [1, 2]}, "inputs[0] is an integer"),
        ({"inputs": "a", "parameters": {"truncate": "yes"}}, "parameters.truncate"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"top_k": 2**65}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"topk": 1}}, "parameters.topk is not a field of this request; known: truncate"),
        ({"inputs": "a", "parameters": "secret"}, "parameters: Input should be an object; got a string"),
    ],
)
def test_an_invalid_predict_field_is_named_with_its_rule(body: Any, message: str) -> None:
    error = refused(body, parse_predict)

    assert isinstance(error, InvalidField)
    assert message in error.message


def test_input_text_is_never_quoted() -> None:
    for body in ({"input": ["secret", 1]}, {"input": {"secret": 1}}, {"input": "secret" * 100}):
        assert "secret" not in refused(body).message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"input": "\\ud800"}', b"[" * 2000])
def test_invalid_json_is_400(body: bytes) -> None:
    assert isinstance(refused(body), InvalidJson)


def test_too_many_inputs_are_413() -> None:
    error = refused({"input": ["a"] * 5})

    assert isinstance(error, TooLarge)
    assert error.message == "input has 5 inputs; at most 4 are allowed in one request"


def test_an_unknown_model_is_404_and_a_fill_mask_model_serves_no_embeddings() -> None:
    assert isinstance(refused({"input": "a", "model": "gpt-5"}), ModelNotFound)
    assert (
        "serves fill-mask, not embeddings; call POST /predict"
        in refused({"input": "a"}, of=card(task="fill-mask")).message
    )


def test_fill_mask_top_k_is_limited() -> None:
    body = {"inputs": "a", "parameters": {"top_k": 101}}

    assert (
        "parameters.top_k must be at most 100 for fill-mask; got 101"
        in refused(body, parse_predict, card(task="fill-mask")).message
    )
    assert parse_predict(json.dumps(body).encode(), CARD, LIMITS).options.top_k == 101


def answered(*fragments: bytes) -> Answered:
    request = ParsedRequest(("a",), "input", True, OutputOptions("/predict"), CARD.name)
    return Answered(request, CARD, Tokenized(Ragged.of([range(9)]), (False,)), Postprocessed(fragments))


def test_responses_are_framed_around_the_fragments() -> None:
    embeddings = json.loads(frame_embeddings(answered(b'{"index":0}', b'{"index":1}')).body)
    predictions = json.loads(frame_predict(answered(b'{"label":"a"}')).body)

    assert embeddings == {
        "object": "list",
        "data": [{"index": 0}, {"index": 1}],
        "model": CARD.name,
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    assert predictions == {
        "model": CARD.name,
        "task": "embeddings",
        "predictions": [{"label": "a"}],
        "usage": {"input_tokens": 9},
    }

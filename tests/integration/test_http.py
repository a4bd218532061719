"""The HTTP API: fields, headers, and one test for each way a request can be rejected."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from deployments.telemetry import names
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver
from tests.support.traces import one

MAX_BODY = 4000


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int]) -> int:
    return deploy(
        model={"engine": "fake", "name": "fake-model", "max_length": 16},
        telemetry={"capture_text": True},
        tokenizer={"slow_ms": 0, "cache_max_chars": 20},
        limits={"max_body_bytes": MAX_BODY, "max_inputs": 4, "max_input_chars": 100, "max_timeout_ms": 60_000},
    )


def embed(port: int, **body: Any) -> Answer:
    return call(port, "POST", "/v1/embeddings", body)


def test_openai_response_shape(port: int) -> None:
    answer = embed(port, input=["a b", "c"], model="fake-model", user="u")
    body = answer.json()

    assert answer.headers["content-type"] == "application/json"
    assert {key: body[key] for key in body if key != "data"} == {
        "object": "list",
        "model": "fake-model",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    assert [(item["object"], item["index"], len(item["embedding"])) for item in body["data"]] == [
        ("embedding", 0, 4),
        ("embedding", 1, 4),
    ]


def test_predict_response_shape(port: int) -> None:
    answer = call(port, "POST", "/predict", {"inputs": ["a " * 40, "b"], "parameters": {"truncate": True, "top_k": 3}})
    body = answer.json()

    assert (body["model"], body["task"], body["usage"]) == ("fake-model", "embeddings", {"input_tokens": 19})
    assert [set(prediction) for prediction in body["predictions"]] == [{"embedding", "truncated"}] * 2
    assert [prediction["truncated"] for prediction in body["predictions"]] == [True, False]


def test_an_input_of_exactly_max_length_is_not_truncated(port: int) -> None:
    body = call(port, "POST", "/predict", {"inputs": ["a " * 14, "a " * 15]}).json()

    assert [prediction["truncated"] for prediction in body["predictions"]] == [False, True]


def test_token_ids_are_used_as_is(port: int) -> None:
    one, several = embed(port, input=[5, 6, 7]).json(), embed(port, input=[[5, 6, 7], [8]]).json()

    assert one["usage"]["prompt_tokens"] == 3
    assert several["usage"]["prompt_tokens"] == 4
    assert one["data"][0]["embedding"] == several["data"][0]["embedding"]


def test_dimensions_truncates_and_renormalises(port: int) -> None:
    (item,) = embed(port, input="a b c", dimensions=2).json()["data"]

    assert len(item["embedding"]) == 2
    assert sum(x * x for x in item["embedding"]) == pytest.approx(1)


BAD_FIELDS = [
    ({}, "input", "input is required"),
    ({"input": ""}, "input", "input[0] must not be an empty string"),
    ({"input": []}, "input", "input must not be an empty list"),
    ({"input": None}, "input", "input must be a string or a list of strings"),
    ({"input": 7}, "input", "got an integer"),
    ({"input": {"text": "a"}}, "input", "got an object"),
    ({"input": ["a", 1]}, "input", "input[1] is an integer"),
    ({"input": ["a", ["b"]]}, "input", "input[1] is a list"),
    ({"input": [[]]}, "input", "input[0] must be a non-empty list of token ids"),
    ({"input": [[1, True]]}, "input", "input[0][1] must be a token id; got a boolean"),
    ({"input": [1, "a"]}, "input", "input[0][1] must be a token id; got a string"),
    ({"input": [1, 30_000]}, "input", "input[0][1] must be a token id from 0 to 29999; got 30000"),
    ({"input": [1] * 101}, "input", "input[0] has 101 token ids; at most 100 are allowed"),
    ({"input": "a", "k" * 999: 1}, "k" * 80, "k is not a field of this request"),
    ({"input": [-1]}, "input", "input[0][0] must be a token id of the vocabulary; got -1"),
    ({"input": [10**30]}, "input", "must be a token id of the vocabulary"),
    ({"input": "x" * 101}, "input", "input[0] has 101 characters; at most 100 are allowed"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "a", "dimensions": 5}, "dimensions", "dimensions must be at most 4"),
    ({"input": "a", "dimensions": "2"}, "dimensions", "valid integer"),
    ({"input": "a", "model": 3}, "model", "valid string"),
    ({"input": "a", "inputs": "b"}, "inputs", "inputs is not a field of this request; known: input, model"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_FIELDS)
def test_422_names_the_field_and_the_rule(port: int, body: dict[str, Any], param: str, message: str) -> None:
    answer = embed(port, **body)

    assert answer.status == 422
    assert answer.error["param"] == param
    assert message in answer.error["message"]
    assert (answer.error["type"], answer.error["code"]) == ("invalid_request_error", "invalid_field")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [1, 2]}, "inputs[0] is an integer"),
        ({"inputs": "a", "parameters": {"truncate": "yes"}}, "parameters.truncate"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        (
            {"inputs": "a", "parameters": {"topk": 1}},
            "parameters.topk is not a field of this request; known: truncate, top_k",
        ),
        (
            {"inputs": "a " * 20, "parameters": {"truncate": False}},
            "inputs[0] is 22 tokens long; the model takes at most 16",
        ),
        (["a"], "the body must be a JSON object; got a list"),
    ],
)
def test_422_on_predict(port: int, body: Any, message: str) -> None:
    answer = call(port, "POST", "/predict", body)

    assert answer.status == 422
    assert message in answer.error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"input": "\\ud800"}', b"[" * 2000])
def test_400_for_invalid_json(port: int, body: bytes) -> None:
    answer = call(port, "POST", "/v1/embeddings", body)

    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_413_for_a_large_body_with_or_without_content_length(port: int) -> None:
    announced = call(port, "POST", "/v1/embeddings", b"x" * (MAX_BODY + 1))
    assert (announced.status, announced.error["code"]) == (413, "too_large")
    assert f"at most {MAX_BODY}" in announced.error["message"]

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/embeddings", iter([b"x" * 1000] * 8), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "too_large"
    connection.close()


def test_413_for_too_many_inputs(port: int) -> None:
    answer = embed(port, input=["a"] * 5)

    assert answer.status == 413
    assert answer.error["message"] == "input has 5 inputs; at most 4 are allowed in one request"


def test_404_for_an_unknown_model(port: int) -> None:
    answer = embed(port, input="a", model="gpt-5")

    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "'fake-model'" in answer.error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/embeddings", 405)])
def test_unknown_paths_and_methods_use_the_same_error_shape(port: int, method: str, path: str, status: int) -> None:
    answer = call(port, method, path, headers={"X-Request-ID": "mine"})

    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("timeout", ["0", "-5", "soon", "nan", "60001"])
def test_422_for_an_invalid_timeout(port: int, timeout: str) -> None:
    answer = call(port, "POST", "/v1/embeddings", {"input": "a"}, {"X-Request-Timeout-Ms": timeout})

    assert (answer.status, answer.error["param"]) == (422, "X-Request-Timeout-Ms")
    assert "at most 60000" in answer.error["message"]


def test_504_when_the_deadline_is_too_short_to_start(port: int) -> None:
    answer = call(port, "POST", "/v1/embeddings", {"input": "a"}, {"X-Request-Timeout-Ms": "0.001"})

    assert (answer.status, answer.error["code"]) == (504, "deadline_passed")


def test_504_for_a_body_that_arrives_too_slowly(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nX-Request-Timeout-Ms: 200\r\n\r\n"
        connection.sendall(head.encode() + b'{"input": ')
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = json.loads(response.read())

    assert response.status == 504
    assert body["error"]["message"] == "the deadline passed after 10 bytes of the body had arrived"


@pytest.mark.parametrize(
    ("body", "status"), [({"input": "a b"}, 200), ({"input": 1}, 422), ({"input": [1, 29_999, 30_001]}, 422)]
)
def test_every_response_has_each_header_once(port: int, body: Any, status: int) -> None:
    answer = call(port, "POST", "/v1/embeddings", body, {"X-Request-ID": "mine"})
    sent = [name for name, _ in answer.header_list]

    assert answer.status == status
    assert answer.headers["x-request-id"] == "mine"
    for name in ("x-request-id", "traceresponse", "server-timing"):
        assert sent.count(name) == 1
    timing = answer.server_timing
    assert set(timing) == {"validate", "tokenize", "queue", "forward", "postprocess", "transit", "total"}
    parts = sum(timing.values()) - timing["total"]
    assert abs(parts - timing["total"]) <= max(1.0, 0.05 * timing["total"])


def test_a_missing_request_id_is_generated(port: int) -> None:
    ids = {embed(port, input="a").headers["x-request-id"] for _ in range(2)}

    assert len(ids) == 2


def test_models(port: int) -> None:
    listed = call(port, "GET", "/v1/models").json()
    (model,) = listed["data"]

    assert listed["object"] == "list"
    assert (model["id"], model["object"], model["owned_by"]) == ("fake-model", "model", "slowlens")
    assert isinstance(model["created"], int)
    assert call(port, "GET", "/v1/models/fake-model").json() == model
    assert call(port, "GET", "/v1/models/other").error["code"] == "model_not_found"


def test_openapi_describes_the_request_bodies(port: int) -> None:
    paths = call(port, "GET", "/openapi.json").json()["paths"]
    body = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]

    assert set(paths) == {
        "/v1/embeddings",
        "/predict",
        "/v1/models",
        "/v1/models/{model}",
        "/healthz",
        "/v1/rerank",
        "/v2/rerank",
        *("/embed", "/similarity", "/rerank", "/tokenize", "/info"),
        *("/v2", "/v2/", "/v2/health/live", "/v2/health/ready"),
        *(f"/v2/models/{{model}}{rest}" for rest in ("", "/ready", "/infer", "/versions/{version}")),
        "/v2/models/{model}/versions/{version}/ready",
    }
    assert set(body["properties"]) == {"input", "model", "encoding_format", "dimensions", "user"}
    assert body["required"] == ["input"]
    assert call(port, "GET", "/docs").status == 200


def test_text_is_captured_when_capture_text_is_on(port: int, receiver: OtlpReceiver) -> None:
    answer = embed(port, input=["first text", "second"])
    root = one(receiver.trace(answer.trace_id, names={names.PREDICT}), names.PREDICT)

    assert root.attributes["ai.input_text"] == ["first text", "second"]


def test_repeated_texts_are_cached_unless_they_are_long(port: int, receiver: OtlpReceiver) -> None:
    long = "longer than the cache takes"
    embed(port, input=["cached once", long])
    answer = embed(port, input=["cached once", long, "new"])
    preprocess = one(receiver.trace(answer.trace_id, names={names.PREPROCESS}), names.PREPROCESS)

    assert preprocess.attributes["ai.preprocess.cache_hits"] == 1
    # slow_ms is 0 here, so every tokenization counts as slow.
    ((event, attributes),) = preprocess.events
    assert event == "slow_tokenization"
    assert attributes == {"duration_ms": pytest.approx(preprocess.ms, abs=0.01), "input_length": 11 + len(long) + 3}


def test_healthz(port: int) -> None:
    answer = call(port, "GET", "/healthz")

    assert (answer.status, answer.json()) == (200, {"status": "ok"})

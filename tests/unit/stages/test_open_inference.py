"""The Open Inference Protocol over HTTP and gRPC, on real stages with the fake engine, in one process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.fake import fake_embedding, fake_score, fake_token_id
from deployments.protocols.open_inference import protobuf
from deployments.protocols.open_inference.service import TIME_LEFT
from deployments.protocols.open_inference.tensors import input_specs
from tests.support.grpc import CallContext
from tests.support.local import Application, GenerationApplication, run_with_client

Client = httpx2.AsyncClient
FAKE = {"engine": "fake", "name": "org/small"}
INFER = "/v2/models/org/small/infer"
REQUEST = protobuf.METHODS["ModelInfer"][0]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "slowlens"


def with_client(use: Callable[[Client, Application], Awaitable[None]], **args: Any) -> None:
    async def when_ready(client: Client, application: Application) -> None:
        while (await client.get("/healthz")).status_code != 200:
            await asyncio.sleep(0.001)
        await use(client, application)

    run_with_client(lambda: Application(**{"model": FAKE, **args}), when_ready)


def embedding(text: str) -> list[float]:
    return list(fake_embedding([1, *map(fake_token_id, text.split()), 2]).tolist())


def text_input(*texts: str, **more: Any) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts), **more}


# --- HTTP ------------------------------------------------------------------------------------------------------------


def test_texts_become_embeddings_with_true_shapes() -> None:
    async def use(client: Client, _: Application) -> None:
        answer = await client.post(INFER, json={"id": "7", "inputs": [text_input("a b", "c")]})
        versioned = await client.post(f"{INFER[:-6]}/versions/1/infer", json={"inputs": [text_input("a b")]})
        column = await client.post(INFER, json={"inputs": [text_input("a", "b", shape=[2, 1], data=[["a"], ["b"]])]})

        body = answer.json()
        assert answer.status_code == 200
        assert {key: body[key] for key in ("model_name", "model_version", "id")} == {
            "model_name": "org/small",
            "model_version": "1",
            "id": "7",
        }
        first, second = body["outputs"]
        assert (first["name"], first["datatype"], first["shape"]) == ("embedding", "FP32", [2, 4])
        assert first["data"] == pytest.approx([*embedding("a b"), *embedding("c")])
        assert second == {"name": "truncated", "datatype": "BOOL", "shape": [2], "data": [False, False]}
        assert versioned.json()["outputs"][0]["data"] == pytest.approx(embedding("a b"))
        assert "id" not in versioned.json()
        assert column.json()["outputs"][0]["shape"] == [2, 4]
        assert {"traceresponse", "server-timing"} <= set(answer.headers)

    with_client(use)


def test_token_ids_without_their_padding() -> None:
    async def use(client: Client, _: Application) -> None:
        ids = {"name": "input_ids", "datatype": "INT64", "shape": [2, 3], "data": [[5, 6, 7], [8, 9, 0]]}
        mask = {"name": "attention_mask", "datatype": "INT64", "shape": [2, 3], "data": [1, 1, 1, 1, 1, 0]}
        answer = await client.post(INFER, json={"inputs": [ids, mask], "outputs": [{"name": "embedding"}]})
        bare = await client.post(INFER, json={"inputs": [ids]})

        (only,) = answer.json()["outputs"]
        assert only["data"] == pytest.approx([*fake_embedding([5, 6, 7]), *fake_embedding([8, 9])])
        assert bare.json()["outputs"][0]["data"][4:] == pytest.approx(fake_embedding([8, 9, 0]).tolist())

    with_client(use)


def test_tensors_as_bytes_both_ways() -> None:
    async def use(client: Client, _: Application) -> None:
        texts = [b"a b", "ü".encode()]
        binary = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "text",
                        "datatype": "BYTES",
                        "shape": [2],
                        "parameters": {"binary_data_size": len(binary)},
                    }
                ],
                "outputs": [
                    {"name": "truncated", "parameters": {"binary_data": False}},
                    {"name": "embedding", "parameters": {"binary_data": True}},
                ],
            }
        ).encode()
        answer = await client.post(
            INFER, content=header + binary, headers={"Inference-Header-Content-Length": str(len(header))}
        )

        length = int(answer.headers["inference-header-content-length"])
        described = json.loads(answer.content[:length])["outputs"]
        assert answer.headers["content-type"] == "application/octet-stream"
        assert described[0] == {"name": "truncated", "datatype": "BOOL", "shape": [2], "data": [False, False]}
        assert described[1]["parameters"] == {"binary_data_size": 32}
        assert np.frombuffer(answer.content[length:], "<f4").tolist() == pytest.approx(
            [*embedding("a b"), *embedding("ü")]
        )

    with_client(use)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        ({}, "inputs is required"),
        ({"inputs": [], "input": 1}, "input is not a field of this request; known: id, parameters, inputs, outputs"),
        ({"inputs": []}, "the input 'text' is required"),
        ({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "date": []}]}, "known: name, shape"),
        ({"inputs": [text_input("a", name="texts")]}, "has no input 'texts'; it has text, input_ids, attention_mask"),
        ({"inputs": [text_input("a", datatype="FP32")]}, "must consist of integers"),
        ({"inputs": [text_input("a", datatype="FP32", data=[1])]}, "must have the datatype BYTES; got 'FP32'"),
        ({"inputs": [text_input("a", shape=[2])]}, "has the shape [2], and 1 elements are there"),
        ({"inputs": [text_input("a", shape=[-1])]}, "must have the shape [-1]; got [-1]"),
        ({"inputs": [text_input("a", shape=[9**99] * 30_000)]}, "must have the shape [-1]; got [2951266543065"),
        ({"inputs": [text_input("a"), text_input("b")]}, "the input 'text' is there twice"),
        ({"inputs": [text_input("")]}, "text[0] must not be an empty string"),
        ({"inputs": [text_input("a", data=None)]}, "the input 'text' has no data"),
        ({"inputs": [text_input("a")], "outputs": [{"name": "logits"}]}, "it has embedding, truncated"),
        ({"inputs": [text_input("a")], "parameters": {"topk": 1}}, "parameters.topk is not known; known: dimensions"),
        ({"inputs": [text_input("a")], "parameters": {"truncate": 1}}, "parameters.truncate must be true or false"),
        ({"inputs": [text_input("a")], "parameters": {"priority": "first"}}, "must be interactive or batch"),
        ({"inputs": [text_input("a")], "parameters": {"timeout": 10**12}}, "parameters.timeout must be an integer"),
        (
            {
                "inputs": [
                    {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [5, 6]},
                    {"name": "attention_mask", "datatype": "INT64", "shape": [1, 2], "data": [0, 1]},
                ]
            },
            "must have ones, and then zeros, in each row",
        ),
        (
            {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [99999]}]},
            "input_ids[0][0] must be a token id from 0 to 29999",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_told(body: Any, message: str) -> None:
    async def use(client: Client, _: Application) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post(INFER, content=content)
        assert answer.status_code == 400
        assert set(answer.json()) == {"error"}
        assert message in answer.json()["error"]

    with_client(use)


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ("x", b"{}", "Inference-Header-Content-Length must be a number of bytes, at most the 2 of the body; got 'x'"),
        ("3", b"{}", "got '3'"),
        ("14", b'{"inputs": []}extra', "5 bytes behind the JSON belong to no input"),
    ],
)
def test_what_is_wrong_with_the_bytes_is_told(header: str, body: bytes, message: str) -> None:
    async def use(client: Client, _: Application) -> None:
        answer = await client.post(INFER, content=body, headers={"Inference-Header-Content-Length": header})
        assert answer.status_code == 400
        assert message in answer.json()["error"]

    with_client(use)


def test_more_texts_than_are_read_are_not_read_to_their_end() -> None:
    async def use(client: Client, _: Application) -> None:
        header = (
            b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[9],"parameters":{"binary_data_size":3000000}}]}'
        )
        headers = {"Inference-Header-Content-Length": str(len(header))}
        answer = await client.post(INFER, content=header + b"\0" * 3_000_000, headers=headers)
        assert answer.status_code == 400
        assert "at most 65536 are read" in answer.json()["error"]

    with_client(use)


def test_the_route_is_in_the_openapi_document() -> None:
    async def use(client: Client, _: Application) -> None:
        described = (await client.get("/openapi.json")).json()["paths"]["/v2/models/{model}/infer"]["post"]
        assert [one["name"] for one in described["parameters"]] == ["model"]

    with_client(use)


def test_parameters_are_the_deadline_and_the_dimensions() -> None:
    async def use(client: Client, _: Application) -> None:
        cut = await client.post(
            INFER, json={"inputs": [text_input("a")], "parameters": {"dimensions": 2, "priority": 2}}
        )
        raw = await client.post(INFER, json={"inputs": [text_input("a")], "parameters": {"normalize": False}})
        late = await client.post(INFER, json={"inputs": [text_input("b")], "parameters": {"timeout": 1}})

        half = np.array(embedding("a")[:2])
        assert cut.json()["outputs"][0]["data"] == pytest.approx((half / np.linalg.norm(half)).tolist())
        assert raw.json()["outputs"][0]["data"] == pytest.approx(embedding("a"))
        assert (late.status_code, set(late.json())) == (504, {"error"})

    with_client(use)


def test_the_server_and_the_model_are_described() -> None:
    async def use(client: Client, _: Application) -> None:
        server = (await client.get("/v2")).json()
        model = (await client.get("/v2/models/org/small")).json()
        states = [
            (await client.get(path)).status_code
            for path in (
                "/v2/health/live",
                "/v2/health/ready",
                "/v2/models/org/small/ready",
                "/v2/models/org/small/versions/1/ready",
                "/v2/models/org/small/versions/1",
                "/v2/models/org/small/versions/2",
                "/v2/models/other/ready",
            )
        ]
        unknown = await client.post("/v2/models/other/infer", json={"inputs": [text_input("a")]})

        assert (server["name"], server["extensions"]) == ("slowlens", ["binary_tensor_data"])
        assert (model["name"], model["versions"]) == ("org/small", ["1"])
        assert model["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
        assert model["outputs"][0] == {"name": "embedding", "datatype": "FP32", "shape": [-1, 4]}
        assert states == [200, 200, 200, 200, 200, 404, 404]
        assert unknown.status_code == 404
        assert unknown.json() == {"error": "the model 'other' does not exist; served here: 'org/small'"}

    with_client(use)


# --- gRPC ------------------------------------------------------------------------------------------------------------


def message(*texts: str, raw: bool = False, **fields: Any) -> Any:
    sent = REQUEST(model_name="org/small", **fields)
    tensor = sent.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    encoded = [text.encode() for text in texts]
    if raw:
        sent.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in encoded))
    else:
        tensor.contents.bytes_contents.extend(encoded)
    return sent


@pytest.mark.parametrize("raw", [False, True])
def test_a_call_gets_its_tensors_as_bytes_and_the_trace_in_its_metadata(store: Path, raw: bool) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def use(_: Client, application: Application) -> None:
        context = CallContext(traceparent=parent, x_request_id="mine")
        answer = await application.ingress.ModelInfer(message("a b", "c", raw=raw, id="7"), context)

        assert context.code is None
        assert (answer.model_name, answer.model_version, answer.id) == ("org/small", "1", "7")
        assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
            ("embedding", "FP32", [2, 4]),
            ("truncated", "BOOL", [2]),
        ]
        assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == pytest.approx(
            [*embedding("a b"), *embedding("c")]
        )
        assert answer.raw_output_contents[1] == b"\0\0"
        assert context.trailing["x-request-id"] == "mine"
        assert context.trailing["traceresponse"].startswith("00-0af7651916cd43dd8448eb211c80319c-")
        assert "forward" in context.trailing["server-timing"]

    with_client(use)
    (root,) = roots(store)
    assert root["parentSpanId"] == "b7ad6b7169203331"
    assert {"rpc.system.name": "grpc", "rpc.response.status_code": "OK", "ai.request_id": "mine"}.items() <= (
        attributes(root).items()
    )
    assert not [name for name in attributes(root) if name.startswith(("http.", "url."))]


def roots(store: Path) -> list[dict[str, Any]]:
    return [
        span
        for path in store.glob("traces-*")
        for line in path.read_text().splitlines()
        for scope in json.loads(line)["resourceSpans"][0]["scopeSpans"]
        for span in scope["spans"]
        if span["name"] == "ai.inference.predict"
    ]


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


@pytest.mark.parametrize(
    ("sent", "metadata", "code", "details"),
    [
        (REQUEST(model_name="other"), {}, "NOT_FOUND", "model_not_found: the model 'other' does not exist"),
        (REQUEST(model_name="org/small"), {}, "INVALID_ARGUMENT", "invalid_field: the input 'text' is required"),
        (message("x" * 300), {}, "INVALID_ARGUMENT", "too_large: the message has"),
        (message("a"), {TIME_LEFT: "0.001"}, "DEADLINE_EXCEEDED", "deadline_passed: "),
        (message("a"), {"x-request-timeout-ms": "0.001"}, "DEADLINE_EXCEEDED", "deadline_passed: "),
        (message("poison"), {}, "INTERNAL", "model_failed: the model failed on text[0] (ValueError)"),
    ],
)
def test_an_error_is_a_status_with_its_code(
    store: Path, sent: Any, metadata: dict[str, str], code: str, details: str
) -> None:
    async def use(_: Client, application: Application) -> None:
        context = CallContext(**metadata)
        await application.ingress.ModelInfer(sent, context)

        assert context.code is getattr(grpc.StatusCode, code)
        assert context.details.startswith(details)
        assert "traceresponse" in context.trailing

    model = {**FAKE, "fake": {"poison_token": fake_token_id("poison")}}
    with_client(use, model=model, limits={"max_body_bytes": 200})
    (root,) = roots(store)
    assert attributes(root)["rpc.response.status_code"] == code


def test_a_call_that_is_cancelled_leaves_the_queue(store: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()

    async def use(_: Client, application: Application) -> None:
        running = asyncio.ensure_future(application.ingress.ModelInfer(message("a"), CallContext()))
        while (await application.model.queue_state())["running"] == 0:
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(application.ingress.ModelInfer(message("b"), CallContext()))
        while (await application.model.queue_state())["waiting"] == 0:
            await asyncio.sleep(0.001)
        waiting.cancel()
        while (await application.model.queue_state())["waiting"]:
            await asyncio.sleep(0.001)
        hold.unlink()
        assert (await running).model_name == "org/small"

    with_client(use, model={**FAKE, "fake": {"hold_path": str(hold)}})
    assert sorted(attributes(root)["rpc.response.status_code"] for root in roots(store)) == ["CANCELLED", "OK"]


def test_keys_travel_in_metadata_and_health_needs_none(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "team", "sha256": hashlib.sha256(b"key").hexdigest()}]))

    async def use(_: Client, application: Application) -> None:
        ingress = application.ingress
        refused, told, let_in = CallContext(), CallContext(), CallContext(authorization="Bearer key")
        await ingress.ModelInfer(message("a"), refused)
        await ingress.ModelMetadata(protobuf.METHODS["ModelMetadata"][0](name="org/small"), told)
        answer = await ingress.ModelInfer(message("a"), let_in)

        assert refused.code is told.code is grpc.StatusCode.UNAUTHENTICATED
        assert refused.details.startswith("invalid_api_key: an API key is needed")
        assert let_in.code is None
        assert answer.outputs
        assert (await ingress.ServerLive(None, CallContext())).live
        assert (await ingress.ServerReady(None, CallContext())).ready

    with_client(use, security={"api_keys": str(keys)})


def test_the_compiled_protocol_is_that_of_its_source(tmp_path: Path) -> None:
    from grpc_tools import protoc

    target = tmp_path / "compiled"
    folder = protobuf.PROTO.parent
    assert protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={target}", str(protobuf.PROTO)]) == 0
    assert target.read_bytes() == protobuf.COMPILED.read_bytes()


# --- cross-encoders and language models ------------------------------------------------------------------------------


def ranked(query: str, text: str) -> float:
    ids = [1, *map(fake_token_id, f"{query} {text}".split()), 2]
    return float(fake_score(ids)[0])


def test_a_cross_encoder_scores_texts_in_their_order() -> None:
    async def use(client: Client, _: Application) -> None:
        query = {"name": "query", "datatype": "BYTES", "shape": [1], "data": ["q"]}
        texts = {"name": "texts", "datatype": "BYTES", "shape": [2], "data": ["x", "y z"]}
        body = {"inputs": [query, texts], "parameters": {"raw_scores": True}, "outputs": [{"name": "score"}]}
        answer = await client.post("/v2/models/r/infer", json=body)
        (score,) = answer.json()["outputs"]
        assert (score["datatype"], score["shape"]) == ("FP32", [2])
        assert score["data"] == pytest.approx([ranked("q", "x"), ranked("q", "y z")])

    with_client(use, model={"engine": "fake", "name": "r", "task": "text-ranking"})


@pytest.mark.parametrize(("types", "offered"), [(2, True), (1, False)])
def test_token_types_are_taken_only_by_models_that_have_them(types: int, offered: bool) -> None:
    """Others would fail on them, and on a GPU take the device with them."""
    card = ModelCard.load(ModelConfig(engine="fake", task="text-ranking"))
    specs = [spec.name for spec in input_specs(replace(card, token_types=types))]
    assert ("token_type_ids" in specs) is offered


def test_a_cross_encoder_takes_pairs_as_token_ids() -> None:
    def tensor(name: str, data: list[list[int]]) -> dict[str, Any]:
        return {"name": name, "datatype": "INT64", "shape": [len(data), len(data[0])], "data": data}

    async def use(client: Client, _: Application) -> None:
        ids, mask = tensor("input_ids", [[1, 5, 6, 2], [1, 7, 2, 0]]), tensor("attention_mask", [[1] * 4, [1, 1, 1, 0]])
        types = tensor("token_type_ids", [[0, 0, 1, 1], [0, 1, 1, 0]])
        query = {"name": "query", "datatype": "BYTES", "shape": [1], "data": ["q"]}
        body = {"inputs": [ids, mask, types], "outputs": [{"name": "score"}], "parameters": {"raw_scores": True}}
        answer = await client.post("/v2/models/r/infer", json=body)
        wrong = await client.post("/v2/models/r/infer", json={"inputs": [ids, tensor("token_type_ids", [[2] * 4] * 2)]})
        both = await client.post("/v2/models/r/infer", json={"inputs": [ids, query]})
        alone = await client.post("/v2/models/r/infer", json={"inputs": [types]})

        expected = [float(fake_score(row)[0]) for row in ([1, 5, 6, 2], [1, 7, 2])]
        assert answer.json()["outputs"][0]["data"] == pytest.approx(expected)
        assert "must consist of zeros and ones" in wrong.json()["error"]
        assert "send the input 'query' or 'input_ids', not both" in both.json()["error"]
        assert "need 'input_ids'" in alone.json()["error"]

    with_client(use, model={"engine": "fake", "name": "r", "task": "text-ranking"})


def test_a_language_model_completes_a_text() -> None:
    body = {"inputs": [text_input("a b")], "parameters": {"max_tokens": 3, "temperature": 0.0, "n": 2}}

    async def use(client: Client, application: Application) -> None:
        whole = await client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 3, "temperature": 0})
        over_http = await client.post("/v2/models/chat/infer", json=body)
        sent = message("a b")
        sent.model_name = "chat"
        sent.parameters["max_tokens"].int64_param = 3
        sent.parameters["temperature"].double_param = 0.0
        context = CallContext()
        over_grpc = await application.ingress.ModelInfer(sent, context)
        wrong = await client.post("/v2/models/chat/infer", json={**body, "parameters": {"best_of": 2}})
        prompt = [1, fake_token_id("a"), fake_token_id("b")]
        ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 3], "data": prompt}
        of_ids = await client.post("/v2/models/chat/infer", json={**body, "inputs": [ids]})
        unknown = await client.post("/v2/models/chat/infer", json={"inputs": [{**ids, "data": [1, 2, 10**9]}]})

        text = whole.json()["choices"][0]["text"]
        assert text
        assert over_http.json()["outputs"] == [
            {"name": "text", "datatype": "BYTES", "shape": [2], "data": [text, text]},
            {"name": "finish_reason", "datatype": "BYTES", "shape": [2], "data": ["length", "length"]},
        ]
        assert of_ids.json()["outputs"] == over_http.json()["outputs"]
        assert "input_ids must consist of token ids from 0 to 29999; got 1000000000" in unknown.json()["error"]
        raw = over_grpc.raw_output_contents[0]
        assert raw == struct.pack("<I", len(text.encode())) + text.encode()
        assert "decode" in context.trailing["server-timing"]
        assert "decode" in over_http.headers["server-timing"]
        assert (wrong.status_code, set(wrong.json())) == (400, {"error"})

    run_with_client(
        lambda: GenerationApplication(model={"engine": "fake", "name": "chat", "task": "text-generation"}), use
    )

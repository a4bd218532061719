"""Three models and a gateway, called by the clients that people have, as they are published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cohere
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import yaml
from huggingface_hub import InferenceClient
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from deployments.cli.main import main
from tests.support.http import call
from tests.support.process import ROOT, serve_run

PORT, GRPC_PORT, METRICS_PORT = 8000, 9000, 9464
BASE = f"http://127.0.0.1:{PORT}"
ENCODER, RANKER, CHAT = "all-MiniLM-L6-v2", "ms-marco-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
GATEWAY = {"application": "gateway"}
TEXTS = ["a cat sat on the mat", "paris is in france"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``slowlens serve serve_models.yaml``, with the fake engine in place of the larger models."""
    folder = tmp_path_factory.mktemp("models")
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_models.yaml").read_text())
    applications = {one["name"]: one for one in config["applications"]}
    for name, task in (("reranker", "text-ranking"), ("llm", "text-generation")):
        applications[name]["args"]["model"] |= {"engine": "fake", "task": task}
    for one in applications.values():
        one["args"].setdefault("telemetry", {})["prometheus"] = {"port": METRICS_PORT}
    del applications["gateway"]["args"]["telemetry"]
    # YAML repeats what is aliased; so does this.
    applications["gateway"]["args"]["applications"] = {
        name: one["args"] for name, one in applications.items() if name != "gateway"
    }
    path = folder / "models.yaml"
    path.write_text(json.dumps(config))
    with serve_run(path, folder / "serve.log", {"XDG_STATE_HOME": str(folder)}, command=("slowlens", "serve")):
        for model in (ENCODER, RANKER, CHAT):
            while call(PORT, "GET", f"/v2/models/{model}/ready").status != 200:
                pass
        yield folder
    shutil.rmtree(folder / "slowlens", ignore_errors=True)


@pytest.fixture(scope="module")
def expected(state: Path) -> Any:
    answer = call(PORT, "POST", "/v1/embeddings", {"input": TEXTS, "model": ENCODER})
    assert answer.status == 200, answer.body
    return np.array([one["embedding"] for one in answer.json()["data"]], dtype=np.float32)


def test_openai(expected: Any) -> None:
    client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none")
    embedded = client.embeddings.create(model=ENCODER, input=TEXTS)
    told = client.chat.completions.create(
        model=CHAT, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=5
    )
    streamed = list(client.completions.create(model=CHAT, prompt="once", max_tokens=5, stream=True))

    assert np.allclose([one.embedding for one in embedded.data], expected, atol=1e-5)
    assert told.usage is not None
    assert told.usage.completion_tokens <= 5
    assert streamed[-1].choices[0].finish_reason in ("stop", "length")
    assert [model.id for model in client.models.list()] == [ENCODER, RANKER, CHAT]
    with pytest.raises(openai.NotFoundError, match=f"served here: '{ENCODER}', '{RANKER}', '{CHAT}'"):
        client.embeddings.create(model="another", input="a")


def tensor(module: Any, name: str, *texts: str) -> Any:
    made = module.InferInput(name, [len(texts)], "BYTES")
    made.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
    return made


def test_tritonclient_over_http(expected: Any) -> None:
    with closing(triton_http.InferenceServerClient(f"127.0.0.1:{PORT}")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(RANKER, "1")
        described = client.get_model_metadata(ENCODER)
        binary = client.infer(ENCODER, [tensor(triton_http, "text", *TEXTS)], request_id="7")
        plain = client.infer(
            ENCODER,
            [tensor(triton_http, "text", *TEXTS)],
            outputs=[triton_http.InferRequestedOutput("embedding", binary_data=False)],
        )
        ranked = client.infer(
            RANKER,
            [tensor(triton_http, "query", "a cat"), tensor(triton_http, "texts", *TEXTS)],
            priority=1,
            timeout=20_000_000,
        )
        with pytest.raises(InferenceServerException, match="has no input 'other'; it has text"):
            client.infer(ENCODER, [tensor(triton_http, "other", "a")])

    assert described["outputs"][0] == {"name": "embedding", "datatype": "FP32", "shape": [-1, 384]}
    assert np.allclose(binary.as_numpy("embedding"), expected, atol=1e-5)
    assert binary.get_response()["id"] == "7"
    assert np.allclose(plain.as_numpy("embedding"), expected, atol=1e-5)
    assert ranked.as_numpy("score").shape == (2,)


def test_tritonclient_over_grpc(expected: Any) -> None:
    with closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{GRPC_PORT}")) as client:
        assert client.is_server_ready(headers=GATEWAY)
        assert client.is_model_ready(CHAT, headers=GATEWAY)
        described = client.get_model_metadata(CHAT, headers=GATEWAY, as_json=True)
        embedded = client.infer(ENCODER, [tensor(triton_grpc, "text", *TEXTS)], headers=GATEWAY)
        ids = triton_grpc.InferInput("input_ids", [1, 3], "INT64")
        ids.set_data_from_numpy(np.array([[101, 7592, 102]], dtype=np.int64))
        of_ids = client.infer(ENCODER, [ids], headers=GATEWAY)
        told = client.infer(CHAT, [tensor(triton_grpc, "text", "once")], headers=GATEWAY, parameters={"max_tokens": 4})
        # An application of its own, by its name.
        alone = client.infer(ENCODER, [tensor(triton_grpc, "text", *TEXTS)], headers={"application": "encoder"})
        with pytest.raises(InferenceServerException) as late:
            client.infer(ENCODER, [tensor(triton_grpc, "text", "a")], headers=GATEWAY, client_timeout=0.0005)

    assert described["outputs"][0]["name"] == "text"
    assert np.allclose(embedded.as_numpy("embedding"), expected, atol=1e-5)
    assert np.allclose(alone.as_numpy("embedding"), expected, atol=1e-5)
    assert of_ids.as_numpy("embedding").shape == (1, 384)
    assert told.as_numpy("finish_reason").tolist() in ([b"length"], [b"stop"])
    assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"


_OPEN_INFERENCE = """
import json, sys
import grpc
from open_inference.grpc.protocol import ModelInferRequest, ServerMetadataRequest
from open_inference.grpc.service import GRPCInferenceServiceStub

model, texts = sys.argv[1], sys.argv[2:]
with grpc.insecure_channel("127.0.0.1:9000") as channel:
    stub, metadata = GRPCInferenceServiceStub(channel), (("application", "gateway"),)
    server = stub.ServerMetadata(ServerMetadataRequest(), metadata=metadata)
    request = ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    answer = stub.ModelInfer(request, metadata=metadata)
print(json.dumps([server.name, list(answer.outputs[0].shape), answer.raw_output_contents[0].hex()]))
"""


def test_open_inference_grpc(expected: Any) -> None:
    """In a process of its own: protobuf does not let two clients register the same names in one."""
    command = [sys.executable, "-c", _OPEN_INFERENCE, ENCODER, *TEXTS]
    printed = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    server, shape, data = json.loads(printed)

    assert (server, shape) == ("slowlens", [2, 384])
    assert np.allclose(np.frombuffer(bytes.fromhex(data), "<f4").reshape(shape), expected, atol=1e-5)


def test_huggingface_hub(expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests keep it from the hub, and with that from everything.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    embedded = InferenceClient(f"{BASE}/embed").feature_extraction(TEXTS[0], normalize=True, truncate=True)
    similar = InferenceClient(f"{BASE}/similarity").sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    told = InferenceClient(f"{BASE}/v1").chat_completion(
        [{"role": "user", "content": "hello"}], model=CHAT, max_tokens=4
    )

    assert np.allclose(embedded, expected[:1], atol=1e-5)
    assert similar == pytest.approx([1.0, float(expected[0] @ expected[1])], abs=1e-5)
    assert told.usage.completion_tokens <= 4


def test_cohere(state: Path) -> None:
    first = cohere.Client("none", base_url=BASE).rerank(
        model=RANKER, query="a cat", documents=TEXTS, return_documents=True
    )
    second = cohere.ClientV2("none", base_url=BASE).rerank(model=RANKER, query="a cat", documents=TEXTS, top_n=1)

    assert sorted(one.index for one in first.results) == [0, 1]
    assert first.results[0].relevance_score >= first.results[1].relevance_score
    assert first.results[0].document is not None
    assert first.results[0].document.text == TEXTS[first.results[0].index]
    assert [one.index for one in second.results] == [first.results[0].index]
    with pytest.raises(cohere.UnprocessableEntityError):
        cohere.Client("none", base_url=BASE).rerank(model=RANKER, query="a", documents=[])


def test_why_looks_at_one_of_the_models(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(PORT, "POST", "/v1/rerank", {"query": "a cat", "documents": TEXTS})
    assert answer.status == 200
    source = str(state / "slowlens")
    while main(["trace", answer.trace_id, "--source", source]) != 0:
        pass
    found = {}
    for model in (ENCODER, RANKER, CHAT):
        capsys.readouterr()
        assert main(["why", "--source", source, "--model", model, "--format", "json"]) == 0
        found[model] = json.loads(capsys.readouterr().out)

    assert all(set(verdict["models"]) == {model} for model, verdict in found.items())
    assert main(["why", "--source", source, "--model", "another"]) == 1
    assert "there are some of" in capsys.readouterr().err


def test_prometheus_finds_all_models_at_one_target(state: Path) -> None:
    requests = [
        ("/v1/embeddings", {"input": "a", "model": ENCODER}),
        ("/v1/rerank", {"query": "a", "documents": TEXTS}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
    ]
    assert [call(PORT, "POST", path, body).status for path, body in requests] == [200] * 3
    models = set[str]()
    while models < {ENCODER, RANKER, CHAT}:
        scraped = call(METRICS_PORT, "GET", "/metrics").body.decode()
        models = {
            sample.labels["model"]
            for family in text_string_to_metric_families(scraped)
            for sample in family.samples
            if sample.name == "ai_inference_requests_total" and sample.value
        }

    labels = {
        (name, content)
        for family in text_string_to_metric_families(scraped)
        for sample in family.samples
        for name, content in sample.labels.items()
    }
    services = {content for name, content in labels if name == "service_name"}
    assert services == {f"slowlens.{stage}" for stage in ("ingress", "tokenizer", "model", "postprocessor")}
    assert not [content for _, content in labels if "SERVE_REPLICA" in content]

"""Other operator settings combined: Serve's own tracing, its throughput settings, several replicas per stage."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from deployments.engine.fake import fake_embedding, fake_token_id
from deployments.telemetry import names
from tests.support.http import Answer, call, new_traceparent
from tests.support.otlp import OtlpReceiver
from tests.support.process import serve_run
from tests.support.traces import WHOLE_TRACE, WHOLE_TREE, one, tree

PORT = 8000
STAGES = ("Ingress", "Tokenizer", "Model", "Postprocessor")
CONFIG = {
    "tracing_config": {"enabled": True, "sampling_ratio": 1.0},
    "logging_config": {"enable_access_log": False},
    "applications": [
        {
            "name": "slowlens",
            "import_path": "deployments.app:build",
            "args": {"model": {"engine": "fake", "fake": {"base_ms": 5}}},
            "deployments": [
                {"name": stage, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}} for stage in STAGES
            ],
        }
    ],
}


def test_traces_are_complete_and_responses_match_their_requests(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    receiver = OtlpReceiver()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    }
    callers = [new_traceparent() for _ in range(60)]
    texts = [[f"request {number}", "and its second input"] for number in range(60)]

    def send(number: int) -> Answer:
        headers = {"traceparent": callers[number][0]}
        return call(PORT, "POST", "/v1/embeddings", {"input": texts[number]}, headers)

    with serve_run(config, tmp_path / "serve.log", env), ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(send, range(60)))
        traces = [receiver.trace(trace_id, names=WHOLE_TRACE) for _, trace_id, _ in callers]
        # A stage's second replica may start a moment after the first, and `/healthz` answers when the first runs.
        deadline = time.monotonic() + 60
        while len(replicas := replicas_of(receiver)) < 2 * len(STAGES) and time.monotonic() < deadline:
            list(pool.map(send, range(60)))
    receiver.close()

    for answer, inputs in zip(answers, texts, strict=True):
        for item, text in zip(answer.json()["data"], inputs, strict=True):
            ids = [1, *map(fake_token_id, text.split()), 2]
            assert item["embedding"] == pytest.approx(fake_embedding(ids).tolist())
    for (_, trace_id, caller_span), trace in zip(callers, traces, strict=True):
        root = one(trace, names.PREDICT)
        assert (root.trace_id, root.parent_id) == (trace_id, caller_span)
        if len(trace) == len(WHOLE_TRACE):
            assert tree(trace, root) == WHOLE_TREE
        assert {span.service.partition(".")[0] for span in trace} == {"slowlens"}
    assert len(replicas) == 2 * len(STAGES)


def replicas_of(receiver: OtlpReceiver) -> set[str]:
    return {span.resource["service.instance.id"] for span in receiver.spans()}

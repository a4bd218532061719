"""``serve run serve_config.yaml`` as a user starts it: HTTP in, OTLP out, behind each of Serve's HTTP proxies."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from deployments.cli.serve import FAST
from deployments.protocols.open_inference import protobuf
from deployments.telemetry import metrics, names
from tests.support.http import Answer, call, new_traceparent
from tests.support.otlp import OtlpReceiver
from tests.support.process import ROOT, serve_run
from tests.support.traces import WHOLE_TRACE, WHOLE_TREE, Span, named, one, tree

PORT = 8000
REQUESTS = 200
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}


@dataclass(frozen=True)
class Running:
    receiver: OtlpReceiver
    front: str


@pytest.fixture(scope="module", params=["python", "haproxy"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The application behind one proxy: with the Python proxy it exports over gRPC, with HAProxy over HTTP."""
    receiver = OtlpReceiver()
    by_grpc = request.param == "python"
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint if by_grpc else receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if by_grpc else "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": FAST["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].value,
        **({} if by_grpc else HAPROXY),
    }
    log = tmp_path_factory.mktemp(request.param) / "serve.log"
    with serve_run(ROOT / "serve_config.yaml", log, env):
        yield Running(receiver, request.param)
    receiver.close()


def test_200_concurrent_requests_produce_200_complete_traces(running: Running) -> None:
    callers = [new_traceparent() for _ in range(REQUESTS)]

    def send(number: int) -> Answer:
        body = {"input": " ".join(["word"] * (1 + number % 40)) + f" {number}", "model": "all-MiniLM-L6-v2"}
        headers = {"traceparent": callers[number][0], "X-Request-ID": f"request-{number}"}
        return call(PORT, "POST", "/v1/embeddings", body, headers)

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(send, range(REQUESTS)))
    assert [answer.status for answer in answers] == [200] * REQUESTS
    trace_ids = {trace_id for _, trace_id, _ in callers}

    def all_whole(spans: list[Span]) -> bool:
        seen = defaultdict(set)
        for span in spans:
            seen[span.trace_id].add(span.name)
        return all(seen[trace_id] >= WHOLE_TRACE for trace_id in trace_ids)

    spans = running.receiver.wait_for(all_whole, timeout_s=60)
    traces = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)

    for (_, trace_id, caller_span), answer in zip(callers, answers, strict=True):
        trace = traces[trace_id]
        root = one(trace, names.PREDICT)
        assert root.parent_id == caller_span
        assert tree(trace, root) == WHOLE_TREE
        assert len(trace) == len(WHOLE_TRACE), "an orphan: a span that no parent leads to"
        assert answer.headers["traceresponse"] == f"00-{trace_id}-{root.span_id}-01"
        assert root.attributes["ai.request_id"] == answer.headers["x-request-id"]
        assert len({span.resource["service.instance.id"] for span in trace}) == 4
        timing = answer.server_timing
        assert abs(sum(timing.values()) - 2 * timing["total"]) <= max(1.0, 0.05 * timing["total"])
        assert timing["total"] == pytest.approx(root.ms, abs=max(1.0, 0.05 * root.ms))

    check_batches(running.receiver, traces, trace_ids)
    assert coverage(traces, trace_ids) >= 0.95


def test_a_call_over_grpc_is_one_complete_trace(running: Running) -> None:
    traceparent, trace_id, caller_span = new_traceparent()
    text = triton.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([b"over gRPC", b"as bytes"], dtype=object))
    with closing(triton.InferenceServerClient("127.0.0.1:9000")) as client:
        assert client.is_server_live()
        result = client.infer(
            "all-MiniLM-L6-v2",
            [text],
            headers={"traceparent": traceparent, "x-request-id": "over-grpc"},
            client_timeout=20,
        )
        with pytest.raises(InferenceServerException) as refused:
            client.infer("another", [text])
    over_http = call(PORT, "POST", "/v1/embeddings", {"input": ["over gRPC", "as bytes"]})
    spans = running.receiver.wait_for(lambda spans: {s.name for s in spans if s.trace_id == trace_id} >= WHOLE_TRACE)
    trace = [span for span in spans if span.trace_id == trace_id]
    root = one(trace, names.PREDICT)

    expected = [one["embedding"] for one in over_http.json()["data"]]
    assert result.as_numpy("embedding").tolist() == [pytest.approx(row, abs=1e-5) for row in expected]
    assert (refused.value.status(), refused.value.message().partition(":")[0]) == (
        "StatusCode.NOT_FOUND",
        "model_not_found",
    )
    assert root.parent_id == caller_span
    assert tree(trace, root) == WHOLE_TREE
    assert len(trace) == len(WHOLE_TRACE)
    assert root.attributes["rpc.method"] == "inference.GRPCInferenceService/ModelInfer"
    assert root.attributes["rpc.response.status_code"] == "OK"
    assert root.attributes["ai.request_id"] == "over-grpc"
    # The caller's deadline is the request's.
    assert 15_000 < root.attributes["ai.timeout_ms"] <= 20_500


def test_a_call_over_grpc_that_is_cancelled_leaves_the_queue(running: Running) -> None:
    traceparent, trace_id, _ = new_traceparent()
    request, _ = protobuf.METHODS["ModelInfer"]
    # Many seconds of work, of which a run takes half a second at most.
    many = request(model_name="all-MiniLM-L6-v2")
    many.inputs.add(name="text", datatype="BYTES", shape=[256]).contents.bytes_contents.extend(
        b"%d " % number + b"word " * 240 for number in range(256)
    )
    with grpc.insecure_channel("127.0.0.1:9000") as channel:
        infer: Any = channel.unary_unary(
            f"/{protobuf.SERVICE}/ModelInfer", request_serializer=request.SerializeToString
        )
        under_way = infer.future(many, metadata=(("traceparent", traceparent),))
        running.receiver.wait_for(lambda _: depth(running) > 100)
        under_way.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            under_way.result()
    spans = running.receiver.wait_for(
        lambda spans: any(s.trace_id == trace_id and s.name == names.PREDICT for s in spans), timeout_s=20
    )
    root = one([span for span in spans if span.trace_id == trace_id], names.PREDICT)

    assert root.attributes["rpc.response.status_code"] == "CANCELLED"
    assert root.attributes["error.type"] == "cancelled"
    running.receiver.wait_for(lambda _: depth(running) == 0)


def depth(running: Running) -> int:
    """Inputs that wait, by the last metrics that have arrived."""
    points = [point for _, metric, point in running.receiver.metrics() if metric.name == metrics.QUEUE_DEPTH.name]
    return int(points[-1].as_int) if points else 0


def check_batches(receiver: OtlpReceiver, traces: dict[str, list[Span]], trace_ids: set[str]) -> None:
    """Check that forward spans and batches link to each other, and that each forward span is in exactly one batch."""
    forwards = {(f.trace_id, f.span_id): f for t in trace_ids for f in named(traces[t], names.FORWARD_PASS)}
    wanted = {link for forward in forwards.values() for link in forward.links}
    spans = receiver.wait_for(lambda spans: wanted <= {(s.trace_id, s.span_id) for s in spans})
    batches = {(s.trace_id, s.span_id): s for s in named(spans, names.BATCH_FORWARD)}

    for key, forward in forwards.items():
        (link,) = forward.links
        assert key in batches[link].links
    ours = [batches[link] for link in wanted]
    members = [link for batch in ours for link in batch.links if link in forwards]
    assert sorted(members) == sorted(forwards)
    assert max(batch.attributes["ai.batch.actual_size"] for batch in ours) > 1
    for batch in ours:
        assert batch.attributes["ai.batch.actual_size"] == len(batch.links) <= 32
        assert batch.trace_id not in trace_ids


def coverage(traces: dict[str, list[Span]], trace_ids: set[str]) -> float:
    """Return the smallest share of ``predict`` that its children cover, over all requests."""
    shares = []
    for trace_id in trace_ids:
        root = one(traces[trace_id], names.PREDICT)
        children = [s for s in traces[trace_id] if s.parent_id == root.span_id]
        shares.append(sum(s.end - s.start for s in children) / (root.end - root.start))
    assert statistics.fmean(shares) <= 1.0001
    return min(shares)


def test_torch_is_loaded_where_the_model_is_and_nowhere_else(running: Running) -> None:
    loaded: dict[str, bool] = {}
    for process in Path("/proc").glob("[0-9]*"):
        title = (process / "cmdline").read_bytes().partition(b"\0")[0].decode()
        if title.startswith("ray::ServeReplica:slowlens:"):
            loaded[title.rpartition(":")[2]] = "libtorch_cpu" in (process / "maps").read_text()

    assert loaded == {"Ingress": False, "Tokenizer": False, "Model": True, "Postprocessor": False}


def test_an_unsampled_request_leaves_no_spans(running: Running) -> None:
    traceparent, unsampled, _ = new_traceparent(flags="00")
    answer = call(PORT, "POST", "/v1/embeddings", {"input": "a"}, {"traceparent": traceparent})
    later = call(PORT, "POST", "/v1/embeddings", {"input": "b"})
    running.receiver.trace(later.trace_id, names=WHOLE_TRACE)

    assert answer.headers["traceresponse"].split("-")[1] == unsampled
    assert [s for s in running.receiver.spans() if s.trace_id == unsampled] == []


def test_client_disconnect_cancels_the_request(running: Running) -> None:
    traceparent, trace_id, _ = new_traceparent()
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    body = json.dumps({"input": ["many words " * 200] * 256})
    connection.request("POST", "/v1/embeddings", body, {"traceparent": traceparent})
    # The request has passed the tokenizer, and the model needs many seconds to run it.
    running.receiver.trace(trace_id, names={names.PREPROCESS})
    connection.close()
    spans = running.receiver.trace(trace_id, names={names.PREDICT, names.BATCHED_PREDICT})

    for name in (names.PREDICT, names.HOP_MODEL, names.BATCHED_PREDICT):
        assert one(spans, name).attributes["error.type"] == "cancelled"
        assert one(spans, name).status == "ERROR"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-request-disconnect-disabled", b"?1"),
        ("x-request-timeout-seconds", b"0.001"),
        ("x-request-timeout-seconds", b"\xff"),
        ("x-request-id", b"\xff"),
        ("x-session-id", b"\xff"),
        ("x_session_id", b"\xff"),
    ],
)
def test_headers_that_serve_would_obey_or_fail_on(running: Running, name: str, value: bytes) -> None:
    traceparent, trace_id, _ = new_traceparent()
    with closing(http.client.HTTPConnection("127.0.0.1", PORT)) as connection:
        connection.putrequest("POST", "/v1/embeddings")
        body = b'{"input": "a"}'
        for field, content in {
            "Content-Length": str(len(body)).encode(),
            "traceparent": traceparent.encode(),
            name: value,
        }.items():
            connection.putheader(field, content)
        connection.endheaders(body)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["traceresponse"].split("-")[1]) == (200, trace_id), answer.read()


def test_documented_examples_run(running: Running) -> None:
    (curl,) = re.findall(r"^curl -i .*?^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    answer = subprocess.run(["bash", "-c", curl.removesuffix("```")], capture_output=True, text=True, check=True).stdout
    assert len(examples) == 2
    for example in examples:
        subprocess.run([sys.executable, "-c", example], check=True)
    trace_id = re.search(r"traceresponse: 00-(\w{32})-", answer)

    assert trace_id is not None
    assert one(running.receiver.trace(trace_id[1], names=WHOLE_TRACE), names.PREDICT).attributes["ai.input_count"] == 2


def test_metrics_are_exported(running: Running) -> None:
    assert running.receiver.metric_points(metrics.LATENCY.name)
    assert running.receiver.metric_points(metrics.BATCH_SIZE.name)

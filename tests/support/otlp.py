"""A real OTLP receiver, gRPC and HTTP, that keeps what it receives."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

from tests.support.traces import Span, spans_of


class OtlpReceiver:
    """Listens on two free ports of 127.0.0.1 (or, for HTTP, on the given one) until closed."""

    def __init__(self, http_port: int = 0) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._metrics: list[Any] = []
        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        trace_grpc.add_TraceServiceServicer_to_server(_Traces(self), self._grpc)
        metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self._grpc)
        self.grpc_endpoint = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", http_port), _handler(self))
        self.http_endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._grpc.stop(None)
        self._http.shutdown()
        self._http.server_close()

    def take_traces(self, request: trace_pb.ExportTraceServiceRequest) -> None:
        with self._lock:
            self._spans += spans_of(request)

    def take_metrics(self, request: metrics_pb.ExportMetricsServiceRequest) -> None:
        with self._lock:
            self._metrics += list(request.resource_metrics)

    def clear(self) -> None:
        with self._lock:
            self._spans.clear()
            self._metrics.clear()

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def wait_for(self, done: Callable[[list[Span]], bool], timeout_s: float = 30) -> list[Span]:
        """Return all spans once ``done`` accepts them. On timeout, fail with the names of the spans received."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            spans = self.spans()
            if done(spans):
                return spans
            time.sleep(0.05)
        names = sorted(span.name for span in self.spans())
        raise AssertionError(f"not in {timeout_s} s; spans received: {names[:60]} ({len(names)})")

    def trace(self, trace_id: str, *, names: set[str], timeout_s: float = 30) -> list[Span]:
        """Return the spans of one trace once they include all of ``names``."""

        def complete(spans: list[Span]) -> bool:
            return names <= {span.name for span in spans if span.trace_id == trace_id}

        return [span for span in self.wait_for(complete, timeout_s) if span.trace_id == trace_id]

    def metric_points(self, name: str, timeout_s: float = 30) -> list[Any]:
        """Return all data points of a metric received so far, once there are any."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            points = [point for service, metric, point in self.metrics() if metric.name == name]
            if points:
                return points
            time.sleep(0.05)
        raise AssertionError(f"no metric {name} in {timeout_s} s; got {sorted({m.name for _, m, _ in self.metrics()})}")

    def resource_metrics(self) -> list[Any]:
        """Everything received, in order."""
        with self._lock:
            return list(self._metrics)

    def metrics(self) -> list[tuple[str, Any, Any]]:
        """``(service, metric, point)`` of everything received."""
        found = []
        for resource in self.resource_metrics():
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points = getattr(metric, metric.WhichOneof("data")).data_points
                    found += [(attributes["service.name"], metric, point) for point in points]
        return found


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, _: Any) -> Any:  # noqa: N802 - the generated name
        self._receiver.take_traces(request)
        return trace_pb.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, _: Any) -> Any:  # noqa: N802 - the generated name
        self._receiver.take_metrics(request)
        return metrics_pb.ExportMetricsServiceResponse()


def _handler(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                receiver.take_traces(trace_pb.ExportTraceServiceRequest.FromString(body))
            else:
                assert self.path == "/v1/metrics", self.path
                receiver.take_metrics(metrics_pb.ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler

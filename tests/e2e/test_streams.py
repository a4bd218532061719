"""Streams of a language model under HAProxy, as ``slowlens serve`` starts it: to their end, and cut short."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator

import pytest
import yaml

from deployments.telemetry import names
from tests.support.http import call
from tests.support.otlp import OtlpReceiver
from tests.support.process import replicas, serve_run
from tests.support.traces import one

PORT = 8000
CONFIG = {
    "applications": [
        {
            "name": "slowlens",
            "import_path": "deployments.app:build",
            "args": {
                "model": {
                    "engine": "fake",
                    "task": "text-generation",
                    "max_length": 8192,
                    "fake": {"base_ms": 20},
                }
            },
        }
    ]
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtlpReceiver]:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    receiver = OtlpReceiver()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with serve_run(folder / "config.yaml", folder / "serve.log", env, command=("slowlens", "serve")):
        yield receiver
    receiver.close()


class Stream:
    """A completion that is streamed; its answer has begun."""

    def __init__(self, max_tokens: int, **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        body = {"prompt": "a b", "stream": True, "max_tokens": max_tokens}
        self._connection.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **headers}
        )
        self.response = self._connection.getresponse()
        self.trace_id = str(self.response.getheader("traceresponse")).split("-")[1]

    def first(self) -> str:
        return self.response.readline().decode()

    def rest(self) -> list[str]:
        """The events that follow, until the end."""
        events = self.response.read().decode().strip().split("\n\n")
        self._connection.close()
        return events

    def hang_up(self) -> None:
        self.response.close()
        self._connection.close()


def test_it_comes_chunk_by_chunk_and_ends_with_done(receiver: OtlpReceiver) -> None:
    stream = Stream(30)
    first = stream.first()
    events = stream.rest()

    assert stream.response.getheader("content-type") == "text/event-stream; charset=utf-8"
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
    # 30 steps of 20 ms are not gathered into one piece by the proxy.
    assert len(events) > 20
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_whoever_hangs_up_frees_the_device(receiver: OtlpReceiver) -> None:
    stream = Stream(4000)
    stream.first()
    stream.hang_up()

    spans = receiver.trace(stream.trace_id, names={names.GENERATE, names.DECODE, names.PREDICT})
    assert one(spans, names.GENERATE).attributes["error.type"] == "cancelled"
    assert one(spans, names.PREDICT).attributes["error.type"] == "cancelled"
    assert one(spans, names.DECODE).attributes["ai.decode.tokens"] < 1000


def test_a_deadline_in_mid_stream(receiver: OtlpReceiver) -> None:
    events = Stream(4000, **{"x-request-timeout-ms": "1500"}).rest()
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_passed"


def test_a_replica_that_dies_in_mid_stream(receiver: OtlpReceiver) -> None:
    stream = Stream(4000)
    stream.first()
    (replica,) = replicas("Model")
    os.kill(replica, signal.SIGKILL)
    events = stream.rest()

    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "replica_died"
    root = one(receiver.trace(stream.trace_id, names={names.PREDICT}), names.PREDICT)
    assert root.attributes["error.type"] == "replica_died"
    while call(PORT, "GET", "/healthz").status != 200:
        pass
    assert Stream(3).rest()[-1] == "data: [DONE]"

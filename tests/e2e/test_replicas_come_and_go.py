"""Replicas that are killed, and an application that is deployed anew, under load: no request fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from deployments.telemetry import names
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver
from tests.support.process import replicas, serve_run
from tests.support.traces import named, one

PORT = 8000
CLIENTS, REQUESTS = 16, 700
TOKEN = {"RAY_AUTH_MODE": "token"}
"""``serve run`` starts a cluster that asks for the token which it left in the user's folder."""
BEHIND_THE_INGRESS = ("Tokenizer", "Model", "Postprocessor")
KILLS = {100: "Tokenizer", 280: "Model", 460: "Postprocessor"}
"""Which stage loses a replica, by the number of requests sent."""


def configuration(slow_ms: float) -> dict[str, Any]:
    """Two replicas of each stage. A change of the arguments replaces them all."""
    stages = [
        {"name": stage, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
        for stage in ("Ingress", *BEHIND_THE_INGRESS)
    ]
    application = {
        "name": "slowlens",
        "import_path": "deployments.app:build",
        "args": {
            "model": {"engine": "fake", "fake": {"base_ms": 30}},
            "batching": {"max_batch_size": 4},
            "tokenizer": {"slow_ms": slow_ms},
        },
        "deployments": stages,
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "logging_config": {"enable_access_log": False},
        "applications": [application],
    }


def send_all(events: dict[int, Callable[[], object]], enough: Callable[[int], bool]) -> list[Answer]:
    """Send requests with several clients until there are enough; when one has a number in ``events``, call that."""
    lock = threading.Lock()
    answers: list[Answer] = []
    sent = 0

    def client() -> None:
        nonlocal sent
        while True:
            with lock:
                if enough(sent):
                    return
                sent += 1
                number = sent
            if number in events:
                events[number]()
            answers.append(call(PORT, "POST", "/v1/embeddings", {"input": f"word{number} and more"}))

    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(client) for _ in range(CLIENTS)]
        wait(futures, return_when=FIRST_EXCEPTION)
        # One that failed must not leave the others waiting for what it would have done.
        events, enough = {}, lambda _: True
        for future in futures:
            future.result()
    return answers


def test_no_request_fails_when_replicas_are_killed_or_deployed_anew(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(configuration(slow_ms=50)))
    receiver = OtlpReceiver()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }

    def kill(stage: str) -> Callable[[], None]:
        return lambda: os.kill(replicas(stage)[0], signal.SIGKILL)

    with serve_run(config, tmp_path / "serve.log", env):
        assert all(len(replicas(stage)) == 2 for stage in BEHIND_THE_INGRESS)
        killed = send_all({number: kill(stage) for number, stage in KILLS.items()}, lambda sent: sent >= REQUESTS)
        again = receiver.wait_for(lambda spans: any("ai.hop.attempt" in span.attributes for span in spans))

        before = {stage: replicas(stage) for stage in BEHIND_THE_INGRESS}
        config.write_text(yaml.safe_dump(configuration(slow_ms=60)))
        deploy: list[str] = [str(Path(sys.executable).with_name("serve")), "deploy", str(config)]

        def all_new() -> bool:
            return all(
                (now := replicas(stage)) and not set(now) & set(before[stage]) and len(now) == 2
                for stage in BEHIND_THE_INGRESS
            )

        upgraded = send_all(
            {200: lambda: subprocess.run(deploy, check=True, capture_output=True, env={**os.environ, **TOKEN})},
            lambda sent: sent >= REQUESTS and sent % 50 == 0 and all_new(),
        )
    receiver.close()

    assert Counter(answer.status for answer in killed) == {200: REQUESTS}
    (second, *_) = [span for span in again if "ai.hop.attempt" in span.attributes]
    spans = [span for span in again if span.trace_id == second.trace_id]
    first, retried = sorted(named(spans, second.name), key=lambda span: span.start)
    assert second.attributes["ai.hop.attempt"] == 2
    assert (first.status, first.attributes["error.type"]) == ("ERROR", "replica_died")
    assert (retried.span_id, retried.status) == (second.span_id, "UNSET")
    assert one(spans, names.PREDICT).status == "UNSET"
    assert set(Counter(answer.status for answer in upgraded)) == {200}
    assert len(upgraded) >= REQUESTS

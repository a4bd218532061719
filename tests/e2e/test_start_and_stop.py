"""``serve run serve_config.yaml`` and ``slowlens serve`` without a collector, and with an error in the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from deployments.cli.serve import FAST
from deployments.telemetry import metrics
from tests.support.http import call
from tests.support.process import ROOT, is_listening, serve_run, with_page
from tests.support.traces import WHOLE_TRACE

PORT = 8000
FAKE: dict[str, Any] = {
    "applications": [
        {"name": "slowlens", "import_path": "deployments.app:build", "args": {"model": {"engine": "fake"}}}
    ]
}


def test_without_a_collector_traces_and_metrics_go_to_the_local_store(tmp_path: Path) -> None:
    with serve_run(ROOT / "serve_config.yaml", tmp_path / "serve.log", {"XDG_STATE_HOME": str(tmp_path)}):
        answers = [call(PORT, "POST", "/v1/embeddings", {"input": f"text {i}"}) for i in range(20)]
    # The server was stopped with Ctrl-C right after the last response: data still in memory must be on disk too.
    found, seen = stored(tmp_path / "slowlens")
    assert [WHOLE_TRACE - found[answer.trace_id] for answer in answers] == [set()] * len(answers)
    assert {metrics.LATENCY.name, metrics.BATCH_SIZE.name, metrics.QUEUE_DEPTH.name} <= seen


def test_slowlens_serve_starts_with_haproxy_and_the_page_and_ends_on_sigterm(tmp_path: Path) -> None:
    log, config = tmp_path / "serve.log", tmp_path / "config.yaml"
    text = with_page((ROOT / "serve_config.yaml").read_text())
    config.write_text(text.replace("max_age_s: 5", "max_age_s: 0"))
    with serve_run(config, log, {"XDG_STATE_HOME": str(tmp_path)}, command=("slowlens", "serve")) as server:
        answers = [call(PORT, "POST", "/v1/embeddings", {"input": f"text {i}"}) for i in range(5)]
        fronts = processes(b"haproxy")
        # The page may start after the model, and the latest requests may not be written yet.
        while (verdict := call(PORT, "GET", "/slowlens?format=json&since=1h").json()).get("requests", 0) < 5:
            pass
        page = call(PORT, "GET", "/slowlens")
        wrong = call(PORT, "GET", "/slowlens?slowest=all")
        # Service managers send SIGTERM, on which `serve run` would leave HAProxy behind.
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not any(is_listening(port) for port in (PORT, 8404, 9101))
    printed = log.read_text().splitlines()

    assert {answer.status for answer in answers} == {200}
    assert all(f"{name}={setting.value}" in printed for name, setting in FAST.items())
    assert fronts
    assert (verdict["requests"], verdict["schema"], verdict["findings"]) == (5, 1, [])
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"5 answered requests are too few" in page.body
    assert all(answer.trace_id.encode() in page.body for answer in answers)
    assert (wrong.status, wrong.error["param"]) == (422, "slowest")


def test_slowlens_serve_exits_if_an_application_cannot_be_started(tmp_path: Path) -> None:
    log, config = tmp_path / "serve.log", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(FAKE))
    command = [str(Path(sys.executable).with_name("slowlens")), "serve", str(config)]
    with log.open("wb") as out:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            # The file is valid; this is found when the application is built.
            env={**os.environ, "OTEL_TRACES_EXPORTER": "zipkin"},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
    said = log.read_text()
    assert ended.returncode == 1
    assert "slowlens: the application 'slowlens' cannot be started: " in said
    assert "OTEL_TRACES_EXPORTER: 'zipkin' is not one of otlp, console, none" in said
    assert not any(is_listening(port) for port in (PORT, 8404, 9101))


def stored(folder: Path) -> tuple[dict[str, set[str]], set[str]]:
    """What a local store holds: the names of each trace's spans, and those of the metrics."""
    spans: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            content = json.loads(line)
            for resource in content.get("resourceSpans", []):
                for span in resource["scopeSpans"][0]["spans"]:
                    spans[span["traceId"]].add(span["name"])
            for resource in content.get("resourceMetrics", []):
                seen |= {m["name"] for scope in resource["scopeMetrics"] for m in scope["metrics"]}
    return spans, seen


def processes(name: bytes) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if name in read(path)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_an_unknown_key_fails_at_startup_and_is_named(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / "serve_config.yaml").read_text().replace("max_batch_size:", "max_batchsize:"))
    problem = "args.batching.max_batchsize: unknown key; known here: max_batch_size, max_batch_tokens"
    with serve_run(config, tmp_path / "serve.log", {}, until=problem):
        pass

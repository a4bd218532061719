"""``--metrics``: what Prometheus says stands beside the traces. (A real one answers in tests/backends.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from tests.support.made import CASES, otlp, window
from tests.unit.explain.test_backends import serving

VALUES: dict[str, list[tuple[dict[str, str], str]]] = {
    "sum by (outcome)": [({"outcome": "ok"}, "4990"), ({"outcome": "error"}, "10.2"), ({"outcome": "cancelled"}, "0")],
    "histogram_quantile": [({}, "41.5")],
    "sum (": [({}, "7")],
}
COUNTERS_OF_LOSSES = 8


@pytest.fixture
def store(tmp_path: Path) -> str:
    (tmp_path / "traces.jsonl").write_text(otlp(window(CASES["tokenization"], count=120)))
    return str(tmp_path / "traces.jsonl")


def prometheus(query: dict[str, str]) -> Any:
    (found,) = (values for begin, values in VALUES.items() if query["query"].startswith(begin))
    return {"data": {"result": [{"metric": labels, "value": [0, value]} for labels, value in found]}}


def test_metrics_stand_beside_the_traces(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/api/v1/query": prometheus}) as asked:
        assert main(["why", "--source", store, "--metrics", asked.url]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert main(["why", "--source", store, "--metrics", asked.url, "--model", "m", "--format", "json"]) == 1
        assert main(["why", "--source", store, "--metrics", asked.url, "--format", "json"]) == 0
        document = json.loads(capsys.readouterr().out)

    # Requests of 30 s.
    assert f"metrics of {asked.url}: 5000 requests (168.0/s), of them 10 error; p50 42 ms" in printed
    lost = 7 * COUNTERS_OF_LOSSES
    assert f"{lost} spans and records lost" in printed
    assert f"the processes report {lost} lost spans" in printed
    assert document["metrics"]["outcomes"] == {"ok": 4990, "error": 10}
    assert (document["metrics"]["requests"], document["metrics"]["lost"]) == (5000, lost)


def test_a_model_is_asked_for_by_its_label(store: str) -> None:
    named = otlp(window({}, count=60)).replace('"ai.input_length"', '"ai.model.name"').replace('"40"', '"40"')
    Path(store).write_text(named.replace('"intValue": "40"', '"stringValue": "a\\"b"'))
    with serving({"/api/v1/query": prometheus}) as asked:
        assert main(["why", "--source", store, "--metrics", asked.url, "--model", 'a"b']) == 0
    queries = [query["query"][0] for path, query, _ in asked if path == "/api/v1/query"]
    assert 'ai_inference_requests_total{model="a\\"b"}' in queries[0]


@pytest.mark.parametrize("answer", [b"<html>", {"status": "success"}, {"data": {"result": [{"value": 1}]}}, None])
def test_what_is_no_prometheus_is_named(store: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/api/v1/query": answer}) as asked:
        assert main(["why", "--source", store, "--metrics", asked.url]) == 1
        assert f"{asked.url} did not answer /api/v1/query as Prometheus does" in capsys.readouterr().err

"""The page's charts agree with the traces."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from deployments.explain.render.html import as_html
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names
from tests.support.made import RUN_MS, TOKEN_MS, request, span, window
from tests.unit.explain.test_verdict import verdict


def drawn(spans: list[Span]) -> dict[str, Any]:
    """The data embedded in the page."""
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', as_html(verdict(spans)), re.DOTALL
    )
    document: dict[str, Any] = json.loads(data)
    return document


def test_the_stages_add_up_to_the_latency() -> None:
    spans = window({"tokenize": 90.0})
    found = verdict(spans)
    data = drawn(spans)
    of_all = sum(sum(group["ms"]) for group in data["latency"]) / len(data["bins"])
    mean_ms = sum(found.capture.survey.latencies_ms) / 240

    # Four requests in each of the 60 bins.
    assert of_all == pytest.approx(mean_ms, rel=0.01)
    assert {group["part"] for group in data["latency"]} >= {"tokenization", "own work", "transit"}
    assert "padding" not in {group["part"] for group in data["latency"]}


def test_gpu_utilisation_or_device_busy_time_without_a_gpu() -> None:
    spans = window({})
    with_gpu = [
        replace(one, attributes={**one.attributes, "ai.gpu.utilization_pre": 40, "ai.gpu.utilization_post": 60.0})
        if one.name == names.BATCH_FORWARD
        else one
        for one in spans
    ]
    assert set(drawn(with_gpu)["device"]["percent"]) == {50.0}
    assert drawn(with_gpu)["device"]["what"] == "GPU utilisation, %"

    without = drawn(spans)["device"]
    # One run of about 9 ms every 250 ms, on a clock 50 minutes behind that of the ingress.
    assert without["what"].endswith("(no GPU in these traces)")
    assert sum(without["percent"]) / 60 == pytest.approx(100 * 9 / 250, rel=0.1)


def test_model_loads_and_the_requests_that_waited_for_them() -> None:
    spans = [
        one
        for number in range(100)
        for one in request(number, number * 250.0, **({"cold": 2000.0} if number in (40, 41) else {}))
    ]
    spans.append(span("e" * 32, "l", "", names.MODEL_LOAD, "model", 40 * 250.0 - 500, 2300.0))
    cold = drawn(spans)["cold"]

    (load,) = cold["loads"]
    assert load["y"] == 2.3
    # On the ingress clock, accurate to the millisecond of transit.
    assert load["x"] == pytest.approx(10**12 + 40 * 250.0 - 500, abs=5)
    assert int(load["trace"], 16) == 40
    assert sum(cold["requests"]) == 2
    assert {int(trace, 16) for trace in cold["traces"] if trace} <= {40, 41}


def test_forward_time_by_tokens_and_the_fitted_run_cost() -> None:
    data = drawn(window({"tokens": 200}))
    slow, (begin, end) = data["tokens"]["slow"], data["tokens"]["fit"]
    assert {point["x"] for point in slow} == {200}
    assert {point["y"] for point in slow} == {RUN_MS + 200 * TOKEN_MS}
    assert begin == {"x": 0, "y": pytest.approx(RUN_MS, rel=0.1)}
    assert end == {"x": 200, "y": pytest.approx(RUN_MS + 200 * TOKEN_MS, rel=0.05)}
    assert len(data["tokens"]["others"]) == 228


def test_batches_and_their_padding() -> None:
    data = drawn(window({"padding": 300, "tokens": 10}, every=1))
    assert set(data["batches"]["size"]) == {1.0}
    assert set(data["batches"]["padding"]) == {round(100 * 300 / 310, 2)}
    trace = data["traces"][data["batches"]["traces"][0]]
    (run,) = trace["runs"]
    assert "10 tokens and 300 of padding" in run["span"][6]
    assert run["members"] == [data["batches"]["traces"][0]]


def test_a_page_without_requests_says_so() -> None:
    page = as_html(verdict([]))
    assert "no requests" in page
    assert "0 answered requests are too few" in page
    assert drawn([])["traces"] == {}


def test_latency_by_cause_counts_every_request_once() -> None:
    data = drawn(window({"tokenize": 90.0}))["causes"]
    by_cause = {one["cause"]: one["requests"] for one in data["causes"]}

    assert set(by_cause) == {"no cause", "tokenization"}
    assert sum(by_cause["tokenization"]) == 20
    assert sum(by_cause["no cause"]) == 220
    # Those that lost time to it are the slowest.
    edges = data["edges"]
    slow = [edges[number] for number, count in enumerate(by_cause["tokenization"]) if count]
    others = [edges[number] for number, count in enumerate(by_cause["no cause"]) if count]
    assert min(slow) > max(others)
    traces = next(one["traces"] for one in data["causes"] if one["cause"] == "tokenization")
    assert {int(trace, 16) % 12 for trace in traces if trace} == {3}


def test_the_timeline_shows_what_the_device_ran_while_the_longest_waited() -> None:
    # A large request runs for 400 ms from 2 ms before another arrives, which waits for it.
    spans = window({"tokens": 800}, every=60)
    spans += [*request(500, 3.5 * 250.0, busy=390.0)]
    data = drawn(spans)["timeline"]

    assert data["replica"] == "model"
    assert data["waiting"]
    assert max(wait["to"] - wait["from"] for wait in data["waiting"]) == pytest.approx(390, abs=1)
    blocks = {block["kind"] for block in data["blocks"]}
    assert "large requests" in blocks
    (large,) = [block for block in data["blocks"] if block["kind"] == "large requests"]
    assert int(large["trace"], 16) == 3
    # On the clock of the ingress, as everything on the page.
    assert large["from"] == pytest.approx(10**12 + 3 * 250.0, abs=10)


def test_without_a_wait_there_is_no_timeline() -> None:
    spans = [one for one in window({}) if one.name != names.QUEUE]
    assert drawn(spans)["timeline"] == {"replica": "", "blocks": [], "waiting": []}

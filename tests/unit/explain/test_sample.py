"""What the report says of traces of which only some were kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.telemetry import names
from tests.support.made import CASES, otlp, window


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[str], str]:
    def store(state: str) -> str:
        """One in five of 400 numbered requests, with this tracestate."""
        spans = window(CASES["tokenization"], count=400)
        kept = [span for span in spans if int(span.trace_id, 16) % 5 == 0]
        numbered = [
            replace(
                span,
                attributes=span.attributes
                | {names.AI_REQUEST_NUMBER: int(span.trace_id, 16) + 1, names.W3C_TRACESTATE: state},
            )
            if span.name == names.PREDICT
            else span
            for span in kept
        ]
        path = tmp_path / "traces.jsonl"
        path.write_text(otlp(numbered))
        return str(path)

    return store


def said(source: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], Any]:
    assert main(["why", "--source", source]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["why", "--source", source, "--format", "json"]) == 0
    return lines, json.loads(capsys.readouterr().out)


def test_a_sample_that_says_nothing_is_named_in_the_first_line(
    stored: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = stored("")
    lines, document = said(source, capsys)

    assert lines[0].startswith("these numbers are not of all requests: the ingress counted 399,")
    assert (document["requests"], document["sampling"]["weights"]) == (80, "unknown")
    assert document["sampling"]["missing"] == pytest.approx(320, abs=10)
    page = tmp_path / "why.html"
    assert main(["why", "--source", source, "--format", "html", "-o", str(page)]) == 0
    assert "these numbers are not of all requests" in page.read_text()


def test_a_sample_that_says_for_how_many_it_stands_counts_for_all(
    stored: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Kept with a probability of a fifth: sorted out below 0.8 of 2**56.
    lines, document = said(stored("ot=th:cccccccccccccc"), capsys)

    assert "estimated from the 80 whose traces were kept" in " ".join(lines[:2])
    assert document["sampling"]["weights"] == "known"
    assert document["requests"] == pytest.approx(400, abs=10)
    assert document["sampling"]["missing"] == 0
    assert set(document["sampling"]["latency_ms_interval"]) == {"p50", "p90", "p95", "p99"}
    assert [finding["cause"] for finding in document["findings"]] == ["tokenization"]

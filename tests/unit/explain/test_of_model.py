"""The traces of one model, where several share a store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.explain.render.text import as_json, headline
from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.of_model import NoSuchModel, OfModel
from deployments.explain.traces.otlp import Span
from deployments.explain.verdict import examine
from deployments.telemetry import names
from tests.support.made import otlp, window


def of(model: str, spans: Iterable[Span]) -> list[Span]:
    """These spans as those of a model, in traces of their own."""
    return [
        replace(
            span,
            trace_id=f"{model}{span.trace_id[1:]}",
            links=tuple((f"{model}{trace_id[1:]}", span_id) for trace_id, span_id in span.links),
            attributes={**span.attributes, names.AI_MODEL_NAME: model},
        )
        for span in spans
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One model that tokenizes slowly at times, and one whose answers are formatted slowly."""
    both = [*of("a", window({"tokenize": 90.0})), *of("b", window({"postprocess": 60.0}))]
    (tmp_path / "traces.jsonl").write_text(otlp(both))
    return tmp_path


def test_only_the_requests_of_the_model_are_judged(store: Path) -> None:
    first, second = (examine(OfModel(TraceFiles(store), model), 0.05) for model in ("a", "b"))
    both = json.loads(as_json(examine(TraceFiles(store), 0.05)))

    assert [one.cause for one in first.findings] == ["tokenization"]
    assert [one.cause for one in second.findings] == ["postprocessing"]
    assert first.capture.survey.requests == second.capture.survey.requests == 240
    assert first.capture.incomplete == second.capture.incomplete == 0
    assert both["models"] == {"a": 240, "b": 240}
    assert both["requests"] == 480
    assert headline(first).startswith("240 requests")


def test_an_unknown_model_is_told_with_those_that_there_are(store: Path) -> None:
    with pytest.raises(NoSuchModel, match="no request of the model 'c'; there are some of 'a', 'b'"):
        list(OfModel(TraceFiles(store), "c").roots(0))

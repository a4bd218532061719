"""The traces of one model, or of one Ray cluster, where several share a store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.cli.main import main
from deployments.explain.render.text import as_json, headline
from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.parts import NoSuchPart, OfCluster, OfModel
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
    with pytest.raises(NoSuchPart, match="no request of the model 'c'; there are some of 'a', 'b'"):
        list(OfModel(TraceFiles(store), "c").roots(0))


# --- the old and the new cluster of an upgrade ------------------------------------------------------------------------


@pytest.fixture
def upgraded(tmp_path: Path) -> Path:
    """What two clusters wrote into one store: the new one tokenizes more slowly."""
    old, new = of("a", window({})), of("b", window({"tokenize": 90.0}, every=2))
    both = [
        replace(one, attributes={**one.attributes, names.AI_MODEL_NAME: "m"}, resource={names.RAY_CLUSTER_NAME: name})
        for name, spans in (("slowlens-old", old), ("slowlens-new", new))
        for one in spans
    ]
    (tmp_path / "traces.jsonl").write_text(otlp(both))
    return tmp_path


def test_only_what_the_cluster_did_is_judged(upgraded: Path) -> None:
    one = examine(OfCluster(TraceFiles(upgraded), "slowlens-new"), 0.05)

    assert one.capture.survey.requests == 240
    assert one.capture.incomplete == 0
    assert [finding.cause for finding in one.findings] == ["tokenization"]
    with pytest.raises(
        NoSuchPart, match="no request of the cluster 'x'; there are some of 'slowlens-new', 'slowlens-old'"
    ):
        list(OfCluster(TraceFiles(upgraded), "x").roots(0))


def test_the_new_cluster_is_compared_with_the_old_one(upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["why", "--source", str(upgraded), "--cluster", "slowlens-new", "--format", "json"]

    assert main([*command, "--against", "cluster:slowlens-old"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["against"]["requests"]) == (240, 240)
    assert [one["cause"] for one in found["findings"]] == ["tokenization"]
    assert main([*command, "--against", "cluster:y"]) == 1
    assert "no request of the cluster 'y'" in capsys.readouterr().err


def test_a_cluster_has_to_be_named_and_is_not_told_apart_in_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--against", "cluster:"], ["--cluster", "a", "--metrics", "http://localhost:9"]):
        with pytest.raises(SystemExit, match="2"):
            main(["why", *arguments])
    told = capsys.readouterr().err
    assert "must name a Ray cluster, such as cluster:slowlens-abcde" in told
    assert "argument --cluster: not with --metrics" in told

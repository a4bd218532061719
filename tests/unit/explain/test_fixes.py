"""Fixes as data, for what the cases of the verdict do not reach; advice without a share of the excess."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.explain import fixes
from deployments.explain.fixes import Change, advice, after_failures
from deployments.explain.render.text import fix_text
from deployments.explain.requests.capture import Capture
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Survey
from deployments.telemetry import names
from tests.support.made import window
from tests.unit.explain.test_verdict import verdict


def captured(**settings: Any) -> Capture:
    return Capture(Survey(), settings={key.replace("__", "."): value for key, value in settings.items()})


def test_advice_is_the_same_whatever_was_read() -> None:
    assert advice("look at the network")(captured(), ()).pieces == ("look at the network",)
    assert advice("look at the network")(captured(), ()).changes == ()


def test_warm_replicas_by_how_the_deployment_is_scaled() -> None:
    least = "deployments.Model.autoscaling_config.min_replicas"
    fixed = captured(deployments__Model__num_replicas=2)

    assert fixes.warm_replicas(captured(), ()).changes == (Change(least, None, 1),)
    assert fixes.warm_replicas(replace(captured(), settings={least: 0}), ()).changes == (Change(least, 0, 1),)
    assert fixes.warm_replicas(fixed, ()).changes == (Change("deployments.Model.num_replicas", 2, 3),)


@pytest.mark.parametrize(
    ("kind", "text", "changes"),
    [
        ("queue_full", "more requests arrived", ["deployments.Model.num_replicas", "batching.max_queue"]),
        ("deadline_passed", "deadlines passed", ["deployments.Model.num_replicas"]),
        ("no_replica_ready", "keep replicas warm", ["deployments.Model.autoscaling_config.min_replicas"]),
        ("replica_died", "process died", ["deployments.Model.num_replicas"]),
        ("internal_error", "check one of these traces", []),
    ],
)
def test_every_kind_of_failure_has_a_fix(kind: str, text: str, changes: list[str]) -> None:
    fix = after_failures(captured(), kind)

    assert text in "".join(piece for piece in fix.pieces if isinstance(piece, str))
    assert [change.key for change in fix.changes] == changes


@pytest.mark.parametrize(
    ("window_setting", "change"),
    [
        (None, Change("batching.grouping_window", None, 128)),
        (1, Change("batching.grouping_window", 1, 128)),
        (128, Change("batching.max_batch_tokens", 4096, 2048)),
    ],
)
def test_padding_is_fixed_by_grouping_first_and_then_by_smaller_batches(
    window_setting: int | None, change: Change
) -> None:
    settings = {"batching__max_batch_tokens": 4096}
    if window_setting is not None:
        settings["batching__grouping_window"] = window_setting

    assert fixes.less_padding(captured(**settings), ()).changes == (change,)


def test_replicas_for_calls_raise_the_limit_of_ongoing_requests_first() -> None:
    found = verdict(window({"there": 60.0}))
    slow = found.capture.requests
    (more,) = fixes.replicas_for_calls(found.capture, slow).changes
    stage = more.key.split(".")[1]
    key = f"deployments.{stage}.max_ongoing_requests"
    low = replace(found.capture, settings={key: 5})

    assert fixes.replicas_for_calls(low, slow).changes == (Change(key, 5, 4000), more)


# --- advisories ------------------------------------------------------------------------------------------------------


def with_attributes(spans: list[Span], name: str, **attributes: Any) -> list[Span]:
    more = {key.replace("__", "."): value for key, value in attributes.items()}
    return [replace(one, attributes=one.attributes | more) if one.name == name else one for one in spans]


def test_many_small_runs_while_inputs_wait_are_advised_against() -> None:
    spans = with_attributes(window({}), names.BATCH_FORWARD, ai__batch__queue_behind=9)
    (finding,) = verdict(spans).findings

    assert (finding.cause, finding.requests, finding.share_of_excess) == ("small_batches", 240, 0.0)
    assert "240 of 240 runs had at most 4 inputs" in finding.summary
    assert "batching.max_batch_tokens (8192)" in fix_text(finding)


def test_small_runs_that_take_long_are_no_waste() -> None:
    spans = with_attributes(window({}), names.BATCH_FORWARD, ai__batch__queue_behind=9)
    slow = [
        replace(one, end_ns=one.start_ns + 300_000_000) if one.name == names.BATCH_FORWARD else one for one in spans
    ]
    assert "small_batches" not in [finding.cause for finding in verdict(slow).findings]


def test_truncation_is_advised_against() -> None:
    spans = with_attributes(window({}), names.PREPROCESS, ai__preprocess__was_truncated=True)
    (finding,) = verdict(spans).findings

    assert (finding.cause, finding.requests) == ("truncation", 240)
    assert len(finding.evidence) == 3


def test_the_stage_that_kept_them_waiting_is_named_whatever_its_clock_says() -> None:
    # The clocks of the stages are hours apart; the hop says how long the call waited for a replica of the model.
    (finding,) = verdict(window({"waited": 60.0})).findings
    assert finding.cause == "replica_queue"
    assert "add replicas of the Model deployment" in fix_text(finding)

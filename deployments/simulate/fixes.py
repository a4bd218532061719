"""What the fixes of a verdict would have done, as far as a replay can tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deployments.errors import ConfigError
from deployments.explain.findings import Finding
from deployments.explain.render.sample import percentiles
from deployments.explain.traces.files import Source
from deployments.explain.verdict import Verdict
from deployments.simulate.recording import NotReplayable, Recording, record
from deployments.simulate.replay import Replayed, replay
from deployments.simulate.settings import KEYS, settings_of

_MOST_REQUESTS = 5_000
"""Of a window for which a replay takes seconds."""
_FAITHFUL = 0.25
"""How far the 99th percentile of a replay without a change may be off for its predictions to be told."""


def predict_fixes(verdict: Verdict, source: Source, since_ns: int) -> None:
    """Add to the findings of a verdict on this source what their first change of a setting is predicted to do."""
    counted = verdict.capture.survey
    known = [finding for finding in verdict.findings if _change_of(finding) is not None]
    if not known or counted.requests > _MOST_REQUESTS or counted.sample.is_sample or counted.sample.says_nothing:
        return
    try:
        recording = record(source, since_ns)
    except NotReplayable:
        return
    was = percentiles(sorted(one.latency_ns / 1e6 for one in recording.answered))["p99"]
    now = _p99(recording, {})
    if now is None or abs(now / was - 1) > _FAITHFUL:
        return
    for finding in known:
        then = _p99(recording, dict([_change_of(finding) or ("", None)]))
        if then is not None:
            at = verdict.findings.index(finding)
            verdict.findings[at] = replace(finding, predicted_p99_ms=(was, then * was / now))


def _change_of(finding: Finding) -> tuple[str, Any] | None:
    if not finding.fix.is_predictable:
        return None
    return next(((one.key, one.proposed) for one in finding.fix.changes if one.key in KEYS), None)


def _p99(recording: Recording, changes: dict[str, Any]) -> float | None:
    """None if the setting cannot be changed so, or if requests would be refused."""
    try:
        done: Replayed = replay(recording, settings_of(recording.settings, recording.replicas, changes))
    except ConfigError:
        return None
    refused_before = sum(bool(one.error) for one in recording.requests)
    if not done.answered or done.refused > refused_before:
        return None
    return percentiles(sorted(outcome.latency_ns / 1e6 for _, outcome in done.answered))["p99"]

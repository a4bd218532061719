"""What a verdict consists of, and the findings that need no comparison: failures and advisories."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deployments.explain.fixes import Fix, after_failures
from deployments.explain.requests.capture import Capture
from deployments.explain.requests.pattern import distinguishing_traits
from deployments.explain.requests.request import Request
from deployments.explain.traces.survey import NOT_OURS, Survey

EVIDENCE = 3
"""Traces of a finding."""
_MIN_RUNS = 20
_MAX_RUN_MS = 500.0
"""``batching.max_run_ms`` where the traces do not state it."""
_DOUBT = 4.0
"""In standard errors."""


@dataclass(frozen=True, slots=True)
class Finding:
    cause: str
    share_of_excess: float
    requests: int
    summary: str
    fix: Fix
    evidence: tuple[tuple[str, float], ...]
    """``(trace id, milliseconds)``, strongest first."""
    p99_ms: tuple[float, float] | None = None
    """The 99th percentile now, and at best without this cause; None if the difference is small."""
    predicted_p99_ms: tuple[float, float] | None = None
    """The same, as predicted for the first change of a setting that the fix proposes; None if that is not known."""


def traits(capture: Capture, concerned: Sequence[Request], stage: str) -> str:
    """What these requests have in common and others do not."""
    return distinguishing_traits(concerned, capture.requests, capture.survey.window_ns, stage, capture.weight)


def failures(found: Capture, excess_ms: float, then: Capture | None) -> Iterator[Finding]:
    """Yield a finding about the requests that failed, if there are any; with ``then``, only if more fail than there.

    Args:
        found: the requests.
        excess_ms: of the slow ones, in total.
        then: those of the period that they are compared with.
    """
    counted = found.survey
    kinds = {kind: count for kind, count in counted.errors.items() if kind not in NOT_OURS}
    if not kinds or (then is not None and not _fail_more_often(then.survey, counted)):
        return
    count = sum(kinds.values())
    listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda pair: -pair[1]))
    read = [request for request in found.requests if request.key in counted.failed]
    worst = sorted(read, key=lambda request: -request.latency_ns)[:EVIDENCE]
    times = Counter(request.request_id for request in found.requests if request.request_id)
    again = sum(times[request.request_id] > 1 for request in read)
    tried = f", {again} of them were sent more than once (same X-Request-ID)" if again else ""
    yield Finding(
        "errors_retries",
        counted.failed_ms / (counted.failed_ms + excess_ms) if counted.failed_ms + excess_ms else 0.0,
        count,
        f"{count} of {counted.requests} requests failed ({listed}){tried}{traits(found, read, 'model')}",
        Fix(
            *after_failures(found, max(kinds, key=kinds.__getitem__)).pieces,
            "; callers that retry add load",
        ),
        tuple((request.trace_id, request.latency_ns / 1e6) for request in worst),
    )


def _fail_more_often(then: Survey, now: Survey) -> bool:
    """Whether a larger share of requests fails than did then, by more than chance (two proportions)."""
    failed = [sum(n for kind, n in one.errors.items() if kind not in NOT_OURS) for one in (then, now)]
    requests = [max(1, one.requests) for one in (then, now)]
    share = sum(failed) / sum(requests)
    error = math.sqrt(share * (1 - share) * (1 / requests[0] + 1 / requests[1]))
    return failed[1] / requests[1] - failed[0] / requests[0] > _DOUBT * error


def both(failed: Finding, delayed: Finding) -> Finding:
    """Requests that failed and requests that were answered at the second attempt, as one finding."""
    return replace(
        failed,
        share_of_excess=min(1.0, failed.share_of_excess + delayed.share_of_excess),
        requests=failed.requests + delayed.requests,
        summary=f"{failed.summary}; {delayed.summary}",
        evidence=(failed.evidence + delayed.evidence)[:EVIDENCE],
    )


def advisories(read: Capture) -> list[Finding]:
    """What is worth knowing beside the causes."""
    found = []
    counted = read.survey
    runs = [run for run in read.runs.values() if run.size]
    # A run that takes long has few inputs for that reason.
    longest_ns = float(read.settings.get("batching.max_run_ms", _MAX_RUN_MS)) / 2 * 1e6
    wasteful = [run for run in runs if run.queue_behind >= run.size and run.size <= 4 and run.took_ns < longest_ns]
    if len(runs) >= _MIN_RUNS and len(wasteful) > len(runs) / 2:
        summary = f"{len(wasteful)} of {len(runs)} runs had at most 4 inputs while at least as many were waiting"
        current = [read.settings.get(f"batching.{key}", "?") for key in ("max_batch_size", "max_batch_tokens")]
        fix = Fix(
            f"batching.max_batch_size ({current[0]}) or batching.max_batch_tokens ({current[1]}) may be too low for "
            "these inputs"
        )
        found.append(Finding("small_batches", 0.0, sum(run.size for run in wasteful), summary, fix, ()))
    truncated = [request for request in read.requests if request.truncated]
    count = round(sum(map(read.weight, truncated)))
    if count > counted.requests / 20:
        summary = f"{count} of {counted.requests} requests had inputs truncated to the model's maximum length"
        fix = Fix("send shorter inputs, or set `truncate: false` to have them rejected")
        evidence = tuple((request.trace_id, 0.0) for request in truncated[:EVIDENCE])
        found.append(Finding("truncation", 0.0, count, summary, fix, evidence))
    if read.lost or read.incomplete > (counted.requests + read.incomplete) / 100:
        said = [f"the processes report {read.lost} lost spans"] if read.lost else []
        if read.incomplete:
            said.append(f"spans are missing from {read.incomplete} requests, so the time they cover is unaccounted")
        summary = "; ".join(said)
        fix = Fix(
            "was the collector unavailable or slow? See otel.sdk.exporter.span.exported (error.type), "
            "ai.telemetry.dropped_records and ai.telemetry.unwritten_spans, and the collector's own losses"
        )
        found.append(Finding("telemetry_loss", 0.0, read.incomplete, summary, fix, ()))
    return found

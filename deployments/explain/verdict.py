"""Why the slow requests were slow: their excess time, by cause.

1. The slow requests are the slowest share of the answered requests, at least five; the others are ordinary.
2. The excess of a part is its time beyond the ordinary amount: the median of the ordinary requests on the same route,
   or zero for waiting, padding and contention, which do no useful work. Work that is always long has no excess.
3. A cause is named if at least a tenth of the slow requests, and more than one, lost to it one and a half times what a
   request takes without any waiting, and if it makes up a seventh of the total excess or most of the excess of a
   quarter of the slow requests. For a cold start one request is enough, because the trace itself states it. If no
   cause qualifies, nothing is unusual.
4. Requests that failed on the server's side do not count as slow; they are a separate cause (``errors_retries``).
   Advisories have no share of the excess and are listed last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from deployments.explain.causes import CAUSES, Cause
from deployments.explain.fixes import Fix, after_failures
from deployments.explain.requests.capture import Capture, capture
from deployments.explain.requests.parts import PARTS, Parts, median, parts_of
from deployments.explain.requests.pattern import distinguishing_traits
from deployments.explain.requests.request import Request
from deployments.explain.requests.scaling import orders_during, scaled_late
from deployments.explain.traces.files import Source
from deployments.explain.traces.survey import NOT_OURS, survey

MIN_REQUESTS = 20
"""Minimum number of answered requests for distinguishing slow from ordinary ones."""
_MIN_OF_USEFUL, _MIN_REQUESTS, _MIN_SHARE, _MIN_MS = 1.5, 0.1, 1 / 7, 5.0
_MIN_RULED = 0.25
"""Share of the slow requests for which a cause makes up most of the excess."""
_EVIDENCE, _MIN_HIT = 3, 2
_MIN_GAIN = 0.1


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


@dataclass(frozen=True, slots=True)
class Judged:
    """An answered request that was read in full."""

    request: Request
    parts: Parts
    weight: float
    """The number of requests it represents."""
    is_slow: bool


@dataclass(slots=True)
class Verdict:
    capture: Capture
    answered: list[Judged]
    """By latency, ascending."""
    excess_ms: dict[str, float]
    """Total over the slow requests, by part."""
    findings: list[Finding] = field(default_factory=list)
    note: str = ""
    """Why no cause is named, if none is."""

    @property
    def whole_excess_ms(self) -> float:
        """Total over the slow requests; parts in which they were faster do not offset others."""
        return sum(max(0.0, ms) for ms in self.excess_ms.values())


def percentile(ascending: Sequence[tuple[float, float]], share: float) -> float:
    """Smallest value with ``share`` of the weight at or below it, of ``(value, weight)`` pairs; 0 if there are none."""
    left = share * sum(weight for _, weight in ascending) * (1 - 1e-9)
    for value, weight in ascending:
        left -= weight
        if left <= 0:
            return value
    return ascending[-1][0] if ascending else 0.0


def examine(source: Source, slowest: float, since_ns: int = 0) -> Verdict:
    """Judge the slowest share (0 to 1) of a source's requests that ended at ``since_ns`` or later."""
    chosen = survey(source.roots(since_ns), slowest, since_ns)
    found = capture(source.spans(chosen), chosen)
    found.lost = source.lost
    return judge(found)


def judge(found: Capture) -> Verdict:
    counted = found.survey
    answered = [
        Judged(request, parts, found.weight(request), request.key in counted.slow)
        for request, parts in zip(found.requests, parts_of(found), strict=True)
        if not request.error
    ]
    answered.sort(key=lambda one: one.request.latency_ns)
    verdict = Verdict(found, answered, dict.fromkeys(PARTS, 0.0))
    if len(counted.latencies_ms) < MIN_REQUESTS:
        verdict.note = (
            f"{len(counted.latencies_ms)} answered requests are too few to tell slow from ordinary; {MIN_REQUESTS} are "
            "needed"
        )
    else:
        _compare(verdict)
    verdict.findings += _failures(verdict)
    verdict.findings.sort(key=lambda finding: -finding.share_of_excess)
    if not verdict.findings and not verdict.note:
        verdict.note = "nothing is unusual: the slowest requests spent their time the same way as the others"
    verdict.findings += _advisories(found)
    return verdict


def _compare(verdict: Verdict) -> None:
    ordinary = [one for one in verdict.answered if not one.is_slow]
    routes = {one.request.route for one in ordinary}
    usual = {route: _usual([one.parts for one in ordinary if one.request.route == route]) for route in routes}
    of_all = _usual([one.parts for one in ordinary])
    excess = []
    for one in verdict.answered:
        base = usual.get(one.request.route, of_all)
        excess.append({part: ms - base[part] for part, ms in one.parts.items()})
    slow = [(one, more) for one, more in zip(verdict.answered, excess, strict=True) if one.is_slow]
    of_each = [sum(max(0.0, ms) for ms in more.values()) for _, more in slow]
    for _, more in slow:
        for part in PARTS:
            verdict.excess_ms[part] += more[part]
    whole = verdict.whole_excess_ms
    useful = sum(of_all.values())
    for cause in CAUSES:
        amounts = [sum(more[part] for part in cause.parts) for _, more in slow]
        hit = sum(ms >= max(_MIN_MS, _MIN_OF_USEFUL * useful) for ms in amounts)
        needed = max(_MIN_REQUESTS * len(slow), 1 if cause.is_stated else _MIN_HIT)
        ruled = sum(ms > all_of_it / 2 for all_of_it, ms in zip(of_each, amounts, strict=True))
        matters = sum(amounts) >= _MIN_SHARE * whole or ruled >= max(_MIN_HIT, _MIN_RULED * len(slow))
        if hit >= needed and matters:
            of_everybody = [sum(more[part] for part in cause.parts) for more in excess]
            gain = _gain(verdict.answered, of_everybody)
            verdict.findings.append(_finding(cause, verdict, [one.request for one, _ in slow], amounts, whole, gain))


def _gain(answered: Sequence[Judged], amounts: Sequence[float]) -> tuple[float, float] | None:
    """Return the 99th percentile now and without these amounts, or None if the difference is small."""
    now = [(one.request.latency_ns / 1e6, one.weight) for one in answered]
    then = sorted((ms - max(0.0, less), weight) for (ms, weight), less in zip(now, amounts, strict=True))
    before, after = percentile(now, 0.99), percentile(then, 0.99)
    return (before, after) if after < (1 - _MIN_GAIN) * before else None


def _usual(ordinary: Sequence[Parts]) -> Parts:
    """Return what a request takes without any waiting: the median of each part that is work, zero for the rest."""
    idle = {part for cause in CAUSES if cause.baseline_is_zero for part in cause.parts}
    return {part: 0.0 if part in idle else median([one[part] for one in ordinary]) for part in PARTS}


def _finding(
    cause: Cause,
    verdict: Verdict,
    slow: Sequence[Request],
    amounts: Sequence[float],
    whole_ms: float,
    gain: tuple[float, float] | None,
) -> Finding:
    hit = [(request, ms) for request, ms in zip(slow, amounts, strict=True) if ms >= _MIN_MS]
    hit.sort(key=lambda pair: -pair[1])
    concerned = [request for request, _ in hit]
    middle, worst = median([ms for _, ms in hit]), hit[0][1]
    summary = (
        f"{len(hit)} of {len(slow)} slow requests spent {middle:.0f} ms more than usual (median; worst {worst:.0f} ms) "
        f"{cause.what}{_traits(verdict.capture, concerned, cause.stage)}"
    )
    if cause.is_for_want_of_replicas:
        loads = verdict.capture.loads
        orders = orders_during(verdict.capture.scalings, concerned, cause.stage.capitalize(), loads)
        summary += scaled_late(orders, loads, verdict.capture.survey.window_ns[1])
    evidence = tuple((request.trace_id, ms) for request, ms in hit[:_EVIDENCE])
    share = sum(amounts) / whole_ms
    fix = cause.fix(verdict.capture, concerned)
    return Finding(cause.name, min(1.0, share), len(hit), summary, fix, evidence, gain)


def _traits(capture: Capture, concerned: Sequence[Request], stage: str) -> str:
    return distinguishing_traits(concerned, capture.requests, capture.survey.window_ns, stage)


def _failures(verdict: Verdict) -> Iterator[Finding]:
    counted = verdict.capture.survey
    kinds = {kind: count for kind, count in counted.errors.items() if kind not in NOT_OURS}
    if not kinds:
        return
    excess_ms = verdict.whole_excess_ms
    count = sum(kinds.values())
    listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda pair: -pair[1]))
    read = [request for request in verdict.capture.requests if request.key in counted.failed]
    worst = sorted(read, key=lambda request: -request.latency_ns)[:_EVIDENCE]
    times = Counter(request.request_id for request in verdict.capture.requests if request.request_id)
    again = sum(times[request.request_id] > 1 for request in read)
    tried = f", {again} of them were sent more than once (same X-Request-ID)" if again else ""
    yield Finding(
        "errors_retries",
        counted.failed_ms / (counted.failed_ms + excess_ms) if counted.failed_ms + excess_ms else 0.0,
        count,
        f"{count} of {counted.requests} requests failed ({listed}){tried}{_traits(verdict.capture, read, 'model')}",
        Fix(
            *after_failures(verdict.capture, max(kinds, key=kinds.__getitem__)).pieces,
            "; callers that retry add load",
        ),
        tuple((request.trace_id, request.latency_ns / 1e6) for request in worst),
    )


def _advisories(read: Capture) -> list[Finding]:
    found = []
    counted = read.survey
    runs = [run for run in read.runs.values() if run.size]
    wasteful = [run for run in runs if run.queue_behind >= run.size and run.size <= 4]
    if len(runs) >= MIN_REQUESTS and len(wasteful) > len(runs) / 2:
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
        evidence = tuple((request.trace_id, 0.0) for request in truncated[:_EVIDENCE])
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

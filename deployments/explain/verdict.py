"""Why the slow requests were slow: what they have in excess, by cause.

1. The slow ones are the slowest part of the requests that were answered, five at least; the others are the ordinary.
2. The excess of a part is what it takes beyond its ordinary amount: the median of the ordinary requests of the same
   route, and nothing for waiting, padding and contention, which serve nobody. Work that is always long has no excess.
3. A cause is named where at least a tenth of the slow requests, and more than one, lost to it one and a half times what
   a request takes without any waiting, and where it makes a seventh of the whole excess. Of a cold start one is enough,
   for the trace itself states it. Otherwise nothing is unusual.
4. Requests that failed on our side are not among the slow ones; they are a cause of their own (``errors_retries``).
   Advisories have no share of the excess and come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.explain.capture import Capture, Request, window_of
from deployments.explain.causes import CAUSES, Cause
from deployments.explain.parts import PARTS, Parts, median, parts_of

MIN_REQUESTS = 20
"""Fewer are too few to tell the slow from the ordinary."""
_MIN_OF_USEFUL, _MIN_REQUESTS, _MIN_SHARE, _MIN_MS = 1.5, 0.1, 1 / 7, 5.0
_EVIDENCE, _MIN_SLOW, _MIN_HIT = 3, 5, 2
_NOT_OURS = {"cancelled", "invalid_json", "invalid_field", "too_large", "model_not_found"}


@dataclass(frozen=True, slots=True)
class Finding:
    cause: str
    share_of_excess: float
    requests: int
    summary: str
    fix: str
    evidence: tuple[tuple[str, float], ...]
    """``(trace id, milliseconds)``, the strongest first."""


@dataclass(slots=True)
class Verdict:
    requests: int
    incomplete: int
    errors: dict[str, int]
    window_ns: tuple[int, int]
    latencies_ms: list[float]
    """Of all answered requests, ascending."""
    parts: list[Parts]
    """Of all answered requests."""
    excess_ms: dict[str, float]
    """Of the slow requests together, by part."""
    findings: list[Finding] = field(default_factory=list)
    note: str = ""
    """Where nothing is named: why."""


def judge(capture: Capture, slowest: float) -> Verdict:
    """The verdict on the slowest part (0 to 1) of the requests."""
    parts = parts_of(capture)
    answered = [(r, p) for r, p in zip(capture.requests, parts, strict=True) if not r.error]
    answered.sort(key=lambda pair: pair[0].latency_ns)
    verdict = Verdict(
        requests=len(capture.requests),
        incomplete=capture.incomplete,
        errors=dict(Counter(request.error for request in capture.requests if request.error)),
        window_ns=window_of(capture.requests),
        latencies_ms=[request.latency_ns / 1e6 for request, _ in answered],
        parts=[p for _, p in answered],
        excess_ms=dict.fromkeys(PARTS, 0.0),
    )
    if len(answered) < MIN_REQUESTS:
        verdict.note = (
            f"{len(answered)} answered requests are too few to tell slow from ordinary; {MIN_REQUESTS} are needed"
        )
    else:
        cut = len(answered) - min(len(answered) - 1, max(_MIN_SLOW, round(len(answered) * slowest)))
        _compare(capture, verdict, answered[:cut], answered[cut:])
    failed = _failures(capture, sum(max(0.0, ms) for ms in verdict.excess_ms.values()))
    if failed is not None:
        verdict.findings.append(failed)
    verdict.findings.sort(key=lambda finding: -finding.share_of_excess)
    if not verdict.findings and not verdict.note:
        verdict.note = "nothing is unusual: the slowest requests spent their time as the others did"
    verdict.findings += _advisories(capture)
    return verdict


def _compare(
    capture: Capture,
    verdict: Verdict,
    ordinary: Sequence[tuple[Request, Parts]],
    slow: Sequence[tuple[Request, Parts]],
) -> None:
    usual = {route: _usual([p for r, p in ordinary if r.route == route]) for route in {r.route for r, _ in ordinary}}
    of_all = _usual([p for _, p in ordinary])
    excess = []
    for request, parts in slow:
        base = usual.get(request.route, of_all)
        excess.append({part: ms - base[part] for part, ms in parts.items()})
        for part in PARTS:
            verdict.excess_ms[part] += excess[-1][part]
    whole = sum(max(0.0, ms) for ms in verdict.excess_ms.values())
    useful = sum(of_all.values())
    for cause in CAUSES:
        amounts = [sum(one[part] for part in cause.parts) for one in excess]
        hit = sum(ms >= max(_MIN_MS, _MIN_OF_USEFUL * useful) for ms in amounts)
        needed = max(_MIN_REQUESTS * len(slow), 1 if cause.is_stated else _MIN_HIT)
        if hit >= needed and sum(amounts) >= _MIN_SHARE * whole:
            verdict.findings.append(_finding(cause, capture, [r for r, _ in slow], amounts, whole))


def _usual(ordinary: Sequence[Parts]) -> Parts:
    """What a request takes that waits for nothing: medians of the work, nothing of the rest."""
    idle = {part for cause in CAUSES if cause.serves_nobody for part in cause.parts}
    return {part: 0.0 if part in idle else median([one[part] for one in ordinary]) for part in PARTS}


def _finding(
    cause: Cause, capture: Capture, slow: Sequence[Request], amounts: Sequence[float], whole_ms: float
) -> Finding:
    hit = [(request, ms) for request, ms in zip(slow, amounts, strict=True) if ms >= _MIN_MS]
    hit.sort(key=lambda pair: -pair[1])
    concerned = [request for request, _ in hit]
    middle, worst = median([ms for _, ms in hit]), hit[0][1]
    summary = (
        f"{len(hit)} of {len(slow)} slow requests spent {middle:.0f} ms more than usual (median; worst {worst:.0f} ms) "
        f"{cause.what}{_where(concerned, capture.requests)}"
    )
    evidence = tuple((request.trace_id, ms) for request, ms in hit[:_EVIDENCE])
    share = sum(amounts) / whole_ms
    return Finding(cause.name, min(1.0, share), len(hit), summary, cause.fix(capture, concerned), evidence)


def _where(concerned: Sequence[Request], everybody: Sequence[Request]) -> str:
    """What sets them apart from the others: a moment, or one of several replicas."""
    said = ""
    replicas = Counter(request.model_replica for request in concerned if request.model_replica)
    if replicas and len({request.model_replica for request in everybody if request.model_replica}) > 1:
        replica, count = replicas.most_common(1)[0]
        if count >= 0.9 * len(concerned) and len(concerned) > 1:
            said += f", nearly all on the replica {replica}"
    begun, ended = window_of(concerned)
    first, last = window_of(everybody)
    if len(concerned) > 1 and ended - begun < (last - first) / 3:
        said += f", all within {(ended - begun) / 1e9:.1f} of the {(last - first) / 1e9:.1f} s seen"
    return said


def _failures(capture: Capture, excess_ms: float) -> Finding | None:
    failed = [request for request in capture.requests if request.error and request.error not in _NOT_OURS]
    if not failed:
        return None
    spent_ms = sum(request.latency_ns for request in failed) / 1e6
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(r.error for r in failed).most_common())
    worst = sorted(failed, key=lambda request: -request.latency_ns)[:_EVIDENCE]
    return Finding(
        "errors_retries",
        spent_ms / (spent_ms + excess_ms) if spent_ms + excess_ms else 0.0,
        len(failed),
        f"{len(failed)} of {len(capture.requests)} requests failed ({kinds}){_where(failed, capture.requests)}",
        "callers that try again make more load: read one of these traces, and the replica's log at its time",
        tuple((request.trace_id, request.latency_ns / 1e6) for request in worst),
    )


def _advisories(capture: Capture) -> list[Finding]:
    found = []
    runs = [run for run in capture.runs.values() if run.size]
    wasteful = [run for run in runs if run.queue_behind >= run.size and run.size <= 4]
    if len(runs) >= MIN_REQUESTS and len(wasteful) > len(runs) / 2:
        summary = f"{len(wasteful)} of {len(runs)} runs had at most 4 inputs while as many or more waited"
        fix = "batching.max_batch_size or batching.max_batch_tokens may be too low for these inputs"
        found.append(Finding("small_batches", 0.0, sum(run.size for run in wasteful), summary, fix, ()))
    cut = [request for request in capture.requests if request.truncated]
    if len(cut) > len(capture.requests) / 20:
        summary = f"inputs of {len(cut)} of {len(capture.requests)} requests were cut to the model's longest input"
        fix = "send shorter inputs, or `truncate: false` to have them refused"
        found.append(
            Finding("truncation", 0.0, len(cut), summary, fix, tuple((r.trace_id, 0.0) for r in cut[:_EVIDENCE]))
        )
    if capture.incomplete > (len(capture.requests) + capture.incomplete) / 100:
        summary = f"spans are missing from {capture.incomplete} requests; what they would have explained is unaccounted"
        fix = "look at ai.telemetry.dropped_records and ai.telemetry.unwritten_spans, and at the collector's own losses"
        found.append(Finding("telemetry_loss", 0.0, capture.incomplete, summary, fix, ()))
    return found

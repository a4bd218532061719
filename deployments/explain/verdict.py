"""Why the slow requests were slow: their excess time, by cause.

1. The slow requests are the slowest share of the answered requests, at least five; the others are ordinary.
2. The excess of a part is its time beyond the ordinary amount: the median of the ordinary requests on the same route,
   or zero for waiting, padding and contention, which do no useful work. Work that is always long has no excess.
   Waiting for a CPU grows with everything else: its ordinary amount is a share of the request's time, and it counts
   where it is more than twice that, or while other processes used more of the CPUs than at other times.
3. A cause is named if at least a tenth of the slow requests, and more than one, lost to it one and a half times what a
   request takes without any waiting, and if it makes up a seventh of the total excess or most of the excess of a
   quarter of the slow requests. For a cold start, a slow reader and a replica that died one request is enough, because
   the trace itself states it. If no
   cause qualifies, nothing is unusual. Waiting for the device counts as far as it is more than what random arrivals
   at this rate make some requests wait (``chance``).
4. If requests take longer from some moment on (``periods``), those before it are the ordinary ones, and what work cost
   then is what it usually costs, however much of the window is slow. What they take longer for is named even if it is
   little for each.
5. Compared with another period (``--against``), a cause is named if requests lose more to it than they did then, on
   average and beyond doubt; the excess is the difference.
6. Requests that failed on the server's side do not count as slow; they are a separate cause (``errors_retries``).
   Advisories have no share of the excess and are listed last.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deployments.explain.causes import CAUSES, Cause
from deployments.explain.chance import usually_starved, wait_by_chance_ms, while_others_had_the_cpus
from deployments.explain.counted import Counted
from deployments.explain.findings import EVIDENCE, Finding, advisories, both, failures, traits
from deployments.explain.fixes import Fix
from deployments.explain.periods import (
    Change,
    Judged,
    Period,
    change_of,
    differences,
    increases,
    is_longer,
    moment_of,
)
from deployments.explain.requests.capture import Capture, capture
from deployments.explain.requests.parts import (
    PARTS,
    Parts,
    Usual,
    first_token_parts_of,
    median,
    parts_of,
    usual_of,
)
from deployments.explain.requests.pattern import clock, what_hindered
from deployments.explain.requests.request import Request
from deployments.explain.requests.scaling import how_loaded, orders_during, scaled_late
from deployments.explain.token_gaps import TokenGap, token_gaps
from deployments.explain.traces.files import Source
from deployments.explain.traces.survey import Key, survey
from deployments.explain.traces.weights import percentile

MIN_REQUESTS = 20
"""Minimum number of answered requests for distinguishing slow from ordinary ones."""
_MIN_REQUESTS, _MIN_SHARE, _MIN_MS = 0.1, 1 / 7, 5.0
_MIN_RULED = 0.25
"""Share of the slow requests for which a cause makes up most of the excess."""
_MIN_HIT = 2
_MIN_GAIN = 0.1
_LEAST_IF_SEEN = 1.0
"""The least that a request must have lost to a cause of which there is other evidence, in times of useful work."""
_CHANCE, _FEW = 1.25, 0.05
"""A wait is no chance if it is so much longer than what this share of the slow requests wait by chance."""


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
    change: Change | None = None
    """If requests take longer from some moment on."""
    against: Period | None = None
    """The period that this one is compared with, if it is not compared within itself."""
    differences: tuple[str, ...] = ()
    """What else is different from ``against``."""
    first_token: Verdict | None = None
    """The same for the times to the first token, if there are generations."""
    usual: Usual = field(default_factory=Usual)
    """What work costs, and how much of it is usual."""
    lost_to: dict[Key, str] = field(default_factory=dict)
    """By request, the named cause that it lost most to, if that was worth naming; slow or not."""
    token_gaps: list[TokenGap] = field(default_factory=list)
    """The longest waits for a token of the slow generations, longest first."""

    @property
    def whole_excess_ms(self) -> float:
        """Total over the slow requests; parts in which they were faster do not offset others."""
        return sum(max(0.0, ms) for ms in self.excess_ms.values())


def examine(
    source: Source,
    slowest: float,
    since_ns: int = 0,
    against: tuple[Source, int, float] | None = None,
    count: Callable[[tuple[int, int], float], Counted] | None = None,
) -> Verdict:
    """Judge the slowest share (0 to 1) of a source's requests that ended at ``since_ns`` or later.

    With ``against``, a source and the Unix nanoseconds from and until which its requests ended, judge instead what
    requests take longer for than those. ``count`` says what metrics counted in a window (``counter_at``).
    """
    found = _read(source, slowest, since_ns)
    if count is not None:
        now_ns = time.time_ns()
        begin_ns, end_ns = found.survey.window_ns if found.survey.requests else (since_ns, now_ns)
        found.counted = count((since_ns or begin_ns, end_ns), now_ns / 1e9)
        found.lost = max(found.lost, found.counted.lost)
    then = _read(against[0], slowest, *against[1:]) if against is not None else None
    return judge(found, then)


def _read(source: Source, slowest: float, since_ns: int, until_ns: float = float("inf")) -> Capture:
    chosen = survey(source.roots(since_ns), slowest, since_ns, until_ns)
    found = capture(source.spans(chosen), chosen)
    found.lost, found.cut = source.lost, source.cut
    if source.is_server and chosen.requests:
        found.late_s = max(0.0, (min(time.time_ns(), until_ns) - chosen.window_ns[1]) / 1e9)
    return found


def judge(found: Capture, then: Capture | None = None) -> Verdict:
    """Judge the requests of a capture, compared with each other or with those of another."""
    counted = found.survey
    moment_ns = moment_of(counted) if then is None else None
    usual = usual_of(found if then is None else then, moment_ns or float("inf"))
    parts = parts_of(found, usual)
    answered = _judged(found, parts)
    verdict = Verdict(found, sorted(answered, key=lambda one: one.request.latency_ns), dict.fromkeys(PARTS, 0.0))
    verdict.usual = usual
    if then is not None:
        verdict.against = Period(then, _judged(then, parts_of(then, usual)))
        verdict.differences = differences(verdict.against, Period(found, answered))
    few = min(len(one.survey.latencies_ms) for one in (found, then or found))
    if few < MIN_REQUESTS:
        verdict.note = f"{few} answered requests are too few to tell slow from ordinary; {MIN_REQUESTS} are needed"
    elif verdict.against is not None:
        _compare_with(verdict.against, Period(found, answered), verdict)
    else:
        if moment_ns is not None:
            verdict.change = _change(found, answered, moment_ns)
        _compare(verdict)
    for finding in failures(found, verdict.whole_excess_ms, then):
        same = next((one for one in verdict.findings if one.cause == finding.cause), None)
        if same is None:
            verdict.findings.append(finding)
        else:
            verdict.findings[verdict.findings.index(same)] = both(finding, same)
    verdict.findings.sort(key=lambda finding: -finding.share_of_excess)
    if not verdict.findings and not verdict.note:
        verdict.note = "nothing is unusual: the slowest requests spent their time the same way as the others"
    verdict.findings += advisories(found)
    if then is None:
        verdict.first_token = _of_first_tokens(verdict, parts, usual)
    verdict.token_gaps = _token_gaps(verdict)
    return verdict


def _judged(found: Capture, parts: Sequence[Parts]) -> list[Judged]:
    """The answered requests, by start time."""
    return [
        Judged(request, of_it, found.weight(request), request.key in found.survey.slow)
        for request, of_it in zip(found.requests, parts, strict=True)
        if not request.error
    ]


def _change(found: Capture, answered: Sequence[Judged], moment_ns: int) -> Change | None:
    before = [one for one in answered if one.request.started_ns < moment_ns]
    after = [one for one in answered if one.request.started_ns >= moment_ns]
    return change_of(moment_ns, Period(found, before), Period(found, after))


def _token_gaps(verdict: Verdict) -> list[TokenGap]:
    """The longest gap of each slow generation."""
    found = verdict.capture
    worst = []
    for one in verdict.answered:
        if one.is_slow and one.request.generation is not None:
            gaps = token_gaps(found.spans[one.request.key], found.segments)
            worst += sorted(gaps, key=lambda gap: -gap.more_ms)[:1]
    return sorted(worst, key=lambda gap: -gap.more_ms)[:EVIDENCE]


def _of_first_tokens(whole: Verdict, every: Sequence[Parts], usual: Usual) -> Verdict | None:
    """Judge the times to the first token: as many of them are slow as latencies are."""
    found = whole.capture
    answered = {one.request.key: one for one in whole.answered}
    pairs = [
        (answered[request.key], parts)
        for request, parts in zip(found.requests, first_token_parts_of(found, every, usual.steps), strict=True)
        if parts is not None and request.key in answered
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: sum(pair[1].values()))
    ordinary = len(pairs) - len(found.survey.slow)
    judged = [Judged(one.request, parts, one.weight, at >= ordinary) for at, (one, parts) in enumerate(pairs)]
    verdict = Verdict(found, judged, dict.fromkeys(PARTS, 0.0))
    if len(judged) >= MIN_REQUESTS:
        _compare(verdict)
        verdict.findings.sort(key=lambda finding: -finding.share_of_excess)
    return verdict


def _compare(verdict: Verdict) -> None:
    change = verdict.change
    ordinary = [
        one
        for one in verdict.answered
        if not one.is_slow and (change is None or one.request.started_ns < change.moment_ns)
    ]
    lasting = change.increases if change is not None else {}
    routes = {one.request.route for one in ordinary}
    usual = {route: _usual([one for one in ordinary if one.request.route == route]) for route in routes}
    of_all = _usual(ordinary)
    starved = usually_starved(ordinary)
    excess = []
    for one in verdict.answered:
        base = usual.get(one.request.route, of_all)
        more = {part: ms - base[part] for part, ms in one.parts.items()}
        more["cpu_starved"] -= starved * sum(one.parts.values())
        excess.append(more)
    slow = [(one, more) for one, more in zip(verdict.answered, excess, strict=True) if one.is_slow]
    of_each = [sum(max(0.0, ms) for ms in more.values()) for _, more in slow]
    weights = [one.weight for one, _ in slow]
    for one, more in slow:
        for part in PARTS:
            verdict.excess_ms[part] += one.weight * more[part]
    whole = verdict.whole_excess_ms
    # What a generation decodes is as long as its answer: waiting is compared with the time to its first token.
    useful = sum(ms for part, ms in of_all.items() if part not in ("decode", "decode_neighbours"))
    of_slow = sum(weights)
    by_chance = _by_chance(verdict.capture, of_slow / max(1.0, verdict.capture.survey.answered))
    # Up to how much of a cause is no finding for each of them.
    no_finding: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(slow))
    no_finding["device_queue"] = [by_chance] * len(slow)
    # Where other processes are seen to have the CPUs, less is one.
    taken = while_others_had_the_cpus(verdict.answered)
    no_finding["cpu_starvation"] = [
        0.0 if one.request.key in taken else starved * sum(one.parts.values()) for one, _ in slow
    ]
    lost: list[tuple[str, list[float]]] = []
    for cause in CAUSES:
        amounts = [sum(more[part] for part in cause.parts) for _, more in slow]
        if cause.name not in lasting:
            amounts = [ms if ms > least else 0.0 for ms, least in zip(amounts, no_finding[cause.name], strict=True)]
        is_seen = [cause.name == "cpu_starvation" and one.request.key in taken for one, _ in slow]
        times = [_LEAST_IF_SEEN if seen else cause.least_of_useful for seen in is_seen]
        hit = [ms >= max(_MIN_MS, least * useful) for ms, least in zip(amounts, times, strict=True)]
        ruled = [ms > all_of_it / 2 for all_of_it, ms in zip(of_each, amounts, strict=True)]
        is_hit = any(hit) if cause.is_stated else sum(hit) >= _MIN_HIT and _sum(hit, weights) >= _MIN_REQUESTS * of_slow
        rules = sum(ruled) >= _MIN_HIT and _sum(ruled, weights) >= _MIN_RULED * of_slow
        # That a replica died is told like failures are, however little time it took.
        matters = _sum(amounts, weights) >= _MIN_SHARE * whole or rules or cause.name == "errors_retries"
        lasts = cause.name in lasting and lasting[cause.name] >= _MIN_SHARE * sum(lasting.values())
        if ((is_hit and matters) or lasts) and max(amounts) >= _MIN_MS:
            of_everybody = [sum(more[part] for part in cause.parts) for more in excess]
            gain = _gain(verdict.answered, of_everybody)
            verdict.findings.append(_finding(cause, verdict, [one for one, _ in slow], amounts, whole, gain))
            lost.append((cause.name, of_everybody))
    for number, one in enumerate(verdict.answered):
        most, name = max(((amounts[number], name) for name, amounts in lost), default=(0.0, ""))
        if most >= _MIN_MS:
            verdict.lost_to[one.request.key] = name


def _compare_with(then: Period, now: Period, verdict: Verdict) -> None:
    """Name what requests lose more time to than they did in another period."""
    if not is_longer(then, now):
        verdict.note = "nothing takes longer than in the period that this one is compared with"
        return
    weight = sum(one.weight for one in now.judged)
    for part in PARTS:
        verdict.excess_ms[part] = weight * (now.mean_ms([part]) - then.mean_ms([part]))
    whole, increased = verdict.whole_excess_ms, increases(then, now)
    for cause in CAUSES:
        more = increased.get(cause.name, 0.0)
        if more * weight < _MIN_SHARE * whole:
            continue
        before = then.mean_ms(cause.parts)
        hit = [(one, sum(one.parts[part] for part in cause.parts) - before) for one in now.judged]
        hit = sorted((pair for pair in hit if pair[1] >= more / 2), key=lambda pair: -pair[1])
        concerned = [one.request for one, _ in hit]
        count = round(sum(one.weight for one, _ in hit))
        summary = (
            f"requests spend {more:.1f} ms more on average ({before:.1f} -> {before + more:.1f} ms) {cause.what}; "
            f"{count} of {round(weight)} spend at least half of that more{traits(now.capture, concerned, cause.stage)}"
        )
        evidence = tuple((one.request.trace_id, ms) for one, ms in hit[:EVIDENCE])
        fix = _after(verdict.differences, cause, cause.fix(now.capture, concerned))
        share = min(1.0, more * weight / whole)
        verdict.findings.append(Finding(cause.name, share, count, summary, fix, evidence))
    if not verdict.findings:
        verdict.note = "requests take longer than in the other period, but no single cause stands out"


def _by_chance(found: Capture, share: float) -> float:
    """How long few of the slow requests would wait for the device by chance; 0 if that is not known."""
    return _CHANCE * wait_by_chance_ms(found, share * _FEW)


def _gain(answered: Sequence[Judged], amounts: Sequence[float]) -> tuple[float, float] | None:
    """Return the 99th percentile now and without these amounts, or None if the difference is small."""
    now = [(sum(one.parts.values()), one.weight) for one in answered]
    then = sorted((ms - max(0.0, less), weight) for (ms, weight), less in zip(now, amounts, strict=True))
    before, after = percentile(now, 0.99), percentile(then, 0.99)
    return (before, after) if after < (1 - _MIN_GAIN) * before else None


def _sum(amounts: Sequence[float], weights: Sequence[float]) -> float:
    """Over all that the requests stand for."""
    return sum(amount * weight for amount, weight in zip(amounts, weights, strict=True))


def _usual(ordinary: Sequence[Judged]) -> Parts:
    """Return what a request takes without any waiting: the median of each part that is work, zero for the rest."""
    idle = {part for cause in CAUSES if cause.baseline_is_zero for part in cause.parts}
    weights = [one.weight for one in ordinary]
    return {part: 0.0 if part in idle else median([one.parts[part] for one in ordinary], weights) for part in PARTS}


def _finding(
    cause: Cause,
    verdict: Verdict,
    slow: Sequence[Judged],
    amounts: Sequence[float],
    whole_ms: float,
    gain: tuple[float, float] | None,
) -> Finding:
    hit = [(one, ms) for one, ms in zip(slow, amounts, strict=True) if ms >= _MIN_MS]
    hit.sort(key=lambda pair: -pair[1])
    concerned = [one.request for one, _ in hit]
    count, of_slow = (round(sum(one.weight for one in ones)) for ones in ([one for one, _ in hit], slow))
    middle, worst = median([ms for _, ms in hit], [one.weight for one, _ in hit]), hit[0][1]
    summary = (
        f"{count} of {of_slow} slow requests spent {middle:.0f} ms more than usual (median; worst {worst:.0f} ms) "
        f"{cause.what}{traits(verdict.capture, concerned, cause.stage)}{_behind(cause, verdict, concerned)}"
    )
    summary += what_hindered(concerned, [ms for _, ms in hit])
    if cause.name == "cold_start":
        summary += how_loaded(concerned, verdict.capture.loads)
    if verdict.change is not None and cause.name in verdict.change.increases:
        summary += (
            f"; since {clock(verdict.change.moment_ns)} every request spends "
            f"{verdict.change.increases[cause.name]:.1f} ms more on it, on average"
        )
    if cause.is_for_want_of_replicas:
        loads = verdict.capture.loads
        orders = orders_during(verdict.capture.scalings, concerned, cause.stage.capitalize(), loads)
        summary += scaled_late(orders, loads, verdict.capture.survey.window_ns[1])
    evidence = tuple((one.request.trace_id, ms) for one, ms in hit[:EVIDENCE])
    share = _sum(amounts, [one.weight for one in slow]) / whole_ms
    different = verdict.change.differences if verdict.change is not None else ()
    fix = _after(different, cause, cause.fix(verdict.capture, concerned))
    return Finding(cause.name, min(1.0, share), count, summary, fix, evidence, gain)


def _after(differences: Sequence[str], cause: Cause, fix: Fix) -> Fix:
    """Where the same work takes longer, what is different is the first to look at."""
    if cause.name != "device_contention" or not differences:
        return fix
    return Fix(f"if what is different explains it ({'; '.join(differences)}), take that back; else ", *fix.pieces)


def _behind(cause: Cause, verdict: Verdict, concerned: Sequence[Request]) -> str:
    """``; 19 of them waited behind others' inputs``: the end of the chain is elsewhere."""
    if not cause.behind:
        return ""
    keys = {request.key for request in concerned}
    those = [one for one in verdict.answered if one.request.key in keys]
    count, of = (
        round(sum(one.weight for one in ones))
        for ones in (
            [one for one in those if one.parts[cause.behind] > sum(one.parts[part] for part in cause.parts) / 2],
            those,
        )
    )
    return f"; {count} of {of} waited behind the inputs of others" if count else ""

"""How many replicas would keep the wait within what the operator accepts. Pure; standard library only.

1. Each replica reports what waits in it, how long it would take it to run that, and how much work arrives
   (``LoadReport``).
2. What arrives must not exceed ``target_utilization`` of the replicas: that is the least number. A replica that is
   ordered now runs one start time later, so what counts is the demand then, if it keeps rising as it did.
3. Where the running replicas need longer than ``target_queue_wait_ms`` for the backlog, there are as many as would run
   it within that time. Where a replica takes longer than that to start, it comes too late for the present backlog;
   then there are as many as will, once they run, clear within another start time what waits by then. Replicas that are
   starting already count for what they will have run by then. A backlog that is gone before a replica has started
   orders none. A backlog also confirms that the demand of the last second is no accident.
4. More replicas are ordered at once, but not for less than a twentieth more. Some are given up only when for
   ``quiet_s``, and for five start times, no more were needed; then as many are kept as were needed at most in that
   time. So a pause between two bursts costs no replica, and one that is slow to start stays longer.
5. A replica whose report is stale, or is no number, counts like the average of the others; one that never reported has
   nothing to do yet. Without any report nothing changes, and while inputs wait in a replica whose rate is not known, no
   replica is given up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deployments.autoscaling.report import LoadReport

Reason = Literal["queue", "demand", "quiet", "bounds", "at_max"]
_MARGIN_UP, _MARGIN_DOWN = 0.05, 0.1
"""Fractions of the replicas by which more, or fewer, must be needed."""
_QUIET_STARTS, _TREND_STARTS = 5.0, 2.0
"""In start times of a replica: the quiet before some are given up, and how far back the trend of demand is measured."""
_MAX_QUIET_S = 600.0
"""Longest such quiet, where ``quiet_s`` asks for no more: Serve's own default."""
_MAX_START_S = 600.0
"""Longest start time that is believed: beyond, the replica waits for room in the cluster."""
_REMEMBERED_STARTS = 3
"""The quickest of them counts: one that waited for room says nothing of the next."""
_REPLICA_CEILING = 10**6
_DEMAND_SAMPLES = 20
"""Over the time in which the trend is measured."""
_NEGLIGIBLE_DEMAND = 1e-3
"""In replicas: what one request leaves in a decaying average."""
_EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Goal:
    """What the operator wants."""

    queue_wait_s: float
    utilization: float = 0.8
    quiet_s: float = 60.0
    min_replicas: int = 1
    max_replicas: int = 2**31


@dataclass(frozen=True, slots=True)
class Observation:
    """One deployment at one moment."""

    at_s: float
    """On a monotonic clock."""
    running: int
    target: int
    """Replicas that are ordered, running ones included."""
    reports: tuple[LoadReport, ...]
    """The fresh ones, of running replicas."""
    queued_calls: float = 0.0
    """Calls that wait in the callers, because every replica has as many as it may (``max_ongoing_requests``)."""
    stale: int = 0
    """Running replicas that reported before, but not lately."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What was observed before. The first one is empty."""

    needs: tuple[tuple[float, int], ...] = ()
    """When how many replicas were needed, within the quiet time; only those that no later need exceeds."""
    orders: tuple[float, ...] = ()
    """When each replica that does not run yet was ordered, the oldest first."""
    starts: tuple[float, ...] = ()
    """Seconds that the latest starts took."""
    running: int = 0
    demands: tuple[tuple[float, float], ...] = ()
    """Moments and the demand then."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and what that was decided on.

    The fields, ``memory`` apart, are the attributes of the span ``ai.autoscaling.decision``.
    """

    reason: Reason
    from_replicas: int
    """The target before."""
    to_replicas: int
    """The target from now on, within the bounds."""
    needed_replicas: int
    """Without bounds."""
    running_replicas: int
    reports: int
    demand: float
    """Replicas' worth of work that arrives."""
    queue_depth: int
    queue_wait_ms: float
    """How long the running replicas need for the backlog."""
    oldest_age_ms: float
    throughput: float
    """Inputs per second of one replica."""
    start_ms: float
    """How long a replica takes to start; 0 where that is not known."""
    memory: Memory = field(compare=False, repr=False, default_factory=Memory)
    """For the next decision."""


def decide(seen: Observation, memory: Memory, goal: Goal) -> Decision:
    """The replicas that there should be. Pure."""
    seen = _credible(seen)
    orders, starts = _follow_starts(seen, memory)
    usual_s = min(starts) if starts else max((report.start_ms / 1e3 for report in seen.reports), default=0.0)
    # A replica that has been starting for longer than usual says that starts take longer now.
    start_s = max(usual_s, min(_MAX_START_S, seen.at_s - orders[0]) if orders else 0.0)
    demand, demand_now, backlog_s = _sums(seen)
    is_late = backlog_s > max(1, seen.running) * goal.queue_wait_s
    if is_late:
        # The backlog confirms that the last second is no accident.
        demand = max(demand, demand_now)
    demands = memory.demands
    if seen.reports:
        demands = _sample_demand(demands, seen.at_s, demand, _TREND_STARTS * usual_s)
        least = (demand + _rise(demands, usual_s)) / goal.utilization if demand > _NEGLIGIBLE_DEMAND else 0.0
        by_queue = _for_queue(seen, orders, start_s, demand, backlog_s, goal.queue_wait_s) if is_late else 0.0
        needed: int = max(math.ceil(min(max(least, by_queue), _REPLICA_CEILING) - _EXACT), 1 if backlog_s > 0 else 0)
        reason: Reason = "queue" if by_queue > least else "demand"
        if any(report.queue_depth > 0 and report.throughput == 0 for report in seen.reports):
            needed = max(needed, seen.target, 1)
    else:
        needed, reason = seen.target, "bounds"
    # The first observation does not know what was needed before; it takes what there is.
    quiet_s = max(goal.quiet_s, min(_MAX_QUIET_S, _QUIET_STARTS * usual_s))
    needs = _add_need(memory.needs or ((seen.at_s, seen.target),), seen.at_s, needed, quiet_s)
    most_needed = max(count for _, count in needs)
    wanted = seen.target
    if needed > seen.target and (is_late or needed >= seen.target * (1 + _MARGIN_UP)):
        wanted = needed
    elif most_needed <= seen.target * (1 - _MARGIN_DOWN):
        wanted, reason = most_needed, "quiet"
    bounded = min(max(wanted, goal.min_replicas), goal.max_replicas)
    if bounded != wanted:
        reason = "at_max" if wanted > goal.max_replicas else "bounds"
    return Decision(
        reason=reason,
        from_replicas=seen.target,
        to_replicas=bounded,
        needed_replicas=needed,
        running_replicas=seen.running,
        reports=len(seen.reports),
        demand=demand,
        queue_depth=int(sum(report.queue_depth for report in seen.reports)),
        queue_wait_ms=backlog_s / max(1, seen.running) * 1e3,
        oldest_age_ms=max((report.oldest_age_ms for report in seen.reports), default=0.0),
        throughput=_throughput(seen),
        start_ms=start_s * 1e3,
        memory=Memory(needs, orders, starts, seen.running, demands),
    )


def _credible(seen: Observation) -> Observation:
    """Reports that cannot be true count as missing."""
    reports = tuple(report for report in seen.reports if report.is_credible)
    queued_calls = seen.queued_calls if math.isfinite(seen.queued_calls) and seen.queued_calls > 0 else 0.0
    return replace(
        seen, reports=reports, queued_calls=queued_calls, stale=seen.stale + len(seen.reports) - len(reports)
    )


def _sums(seen: Observation) -> tuple[float, float, float]:
    """Demand, demand of the last second, and the backlog in seconds of one replica: sums over running replicas."""
    stale = max(0, min(seen.stale, seen.running - len(seen.reports)))
    scale = 1 + stale / max(1, len(seen.reports))
    demand = sum(report.demand for report in seen.reports) * scale
    demand_now = sum(report.demand_now for report in seen.reports) * scale
    backlog_s = sum(report.queue_wait_ms for report in seen.reports) / 1e3 * scale
    # Each of the queued calls has an input or more.
    throughput = _throughput(seen)
    return demand, demand_now, backlog_s + (seen.queued_calls / throughput if throughput > 0 else 0.0)


def _throughput(seen: Observation) -> float:
    """Inputs per second of one replica, on average over those that have run some."""
    known = [report.throughput for report in seen.reports if report.throughput > 0]
    return sum(known) / max(1, len(known))


def _for_queue(
    seen: Observation, orders: Sequence[float], start_s: float, demand: float, backlog_s: float, queue_wait_s: float
) -> float:
    """Replicas that run the backlog within the accepted wait."""
    if start_s <= queue_wait_s:
        return backlog_s / queue_wait_s
    running = max(1, seen.running)
    ahead_s = sum(min(start_s, seen.at_s - ordered) for ordered in orders)
    then_s = backlog_s + (demand - running) * start_s - ahead_s
    left_s = then_s - (running + len(orders)) * queue_wait_s
    return demand + left_s / start_s if left_s > 0 else 0.0


def _follow_starts(seen: Observation, memory: Memory) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """When each replica that is still starting was ordered, and how long the latest starts took."""
    orders, starts = memory.orders, memory.starts
    missing = max(0, seen.target - seen.running)
    gone = len(orders) - missing
    if gone > 0:
        # Those are running now, or were given up because fewer are wanted.
        if seen.running > memory.running:
            starts = (*starts, min(_MAX_START_S, seen.at_s - orders[0]))[-_REMEMBERED_STARTS:]
        orders = orders[gone:]
    return orders + (seen.at_s,) * max(0, -gone), starts


def _sample_demand(
    past: tuple[tuple[float, float], ...], now_s: float, demand: float, span_s: float
) -> tuple[tuple[float, float], ...]:
    """The demand, sampled over the last ``span_s`` seconds."""
    if past and now_s - past[-1][0] < span_s / _DEMAND_SAMPLES:
        return past
    return *((at_s, value) for at_s, value in past if at_s > now_s - span_s), (now_s, demand)


def _rise(past: Sequence[tuple[float, float]], start_s: float) -> float:
    """By how much demand will have grown when a replica has started, by its trend; at most as much again."""
    if len(past) < _DEMAND_SAMPLES // 2:
        return 0.0
    quarter = len(past) // 4
    before, after = past[:quarter], past[-quarter:]
    rise = sum(v for _, v in after) / quarter - sum(v for _, v in before) / quarter
    took_s = sum(t for t, _ in after) / quarter - sum(t for t, _ in before) / quarter
    return min(max(0.0, rise * start_s / took_s), sum(v for _, v in after) / quarter)


def _add_need(
    needs: Sequence[tuple[float, int]], now_s: float, needed: int, quiet_s: float
) -> tuple[tuple[float, int], ...]:
    """Add a need. Earlier ones that are no larger are dropped."""
    kept = [(at_s, count) for at_s, count in needs if at_s > now_s - quiet_s and count > needed]
    return *kept, (now_s, needed)

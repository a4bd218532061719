"""Computes how many replicas keep the wait within what the operator accepts. Pure; standard library only.

1. Each replica reports its backlog, how long it needs to run it, and how much work arrives (``LoadReport``).
2. Arriving work must not exceed ``target_utilization`` of the replicas: that is the minimum number. A replica ordered
   now runs one start time later, so the demand at that time counts, assuming that it keeps rising as it did.
3. If the running replicas need longer than ``target_queue_wait_ms`` for the backlog, the number is as many as would run
   it within that time. If a replica takes longer than that to start, it is too late for the current backlog; then the
   number is as many as will, once running, clear within another start time what is waiting by then. Replicas that are
   already starting count for what they will have run by then. A backlog that will be gone before a replica has started
   orders none. A backlog also confirms that the demand of the last second is not noise.
4. Scaling up is immediate, but not for an increase of less than a twentieth. Replicas are removed only if fewer were
   enough for ``quiet_s`` and for five start times; the largest number needed in that time is kept. So a pause between
   two bursts removes no replica, and replicas that are slow to start are kept longer.
5. A replica whose report is stale or not a number counts as the average of the others; one that never reported has
   nothing to do yet. Without any report nothing changes, and while inputs wait in a replica whose rate is unknown, no
   replica is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deployments.autoscaling.report import LoadReport

Reason = Literal["queue", "demand", "quiet", "bounds", "at_max"]
_MARGIN_UP, _MARGIN_DOWN = 0.05, 0.1
"""Smallest increase and decrease that are acted on, as fractions of the replicas."""
_QUIET_STARTS, _TREND_STARTS = 5.0, 2.0
"""In start times of a replica: the quiet time before some are removed, and how far back the demand trend reaches."""
_MAX_QUIET_S = 600.0
"""Longest such quiet time, unless ``quiet_s`` is longer: Serve's own default."""
_MAX_START_S = 600.0
"""Longest credible start time: beyond it, the replica is waiting for cluster resources."""
_REMEMBERED_STARTS = 3
"""The shortest of them counts: a start that waited for resources does not predict the next."""
_REPLICA_CEILING = 10**6
_DEMAND_SAMPLES = 20
"""Number of samples over the time in which the trend is measured."""
_NEGLIGIBLE_DEMAND = 1e-3
"""In replicas: what remains of one request in a decaying average."""
_EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Goal:
    """The operator's targets and bounds."""

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
    """Ordered replicas, including running ones."""
    reports: tuple[LoadReport, ...]
    """The fresh reports of running replicas."""
    queued_calls: float = 0.0
    """Calls waiting in the callers because every replica is at its limit (``max_ongoing_requests``)."""
    stale: int = 0
    """Running replicas that reported before, but not recently."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Earlier observations; empty at first."""

    needs: tuple[tuple[float, int], ...] = ()
    """Times and the replicas needed then, within the quiet time; only those that no later need exceeds."""
    orders: tuple[float, ...] = ()
    """When each replica that is not running yet was ordered, oldest first."""
    starts: tuple[float, ...] = ()
    """Durations of the latest starts, in seconds."""
    running: int = 0
    demands: tuple[tuple[float, float], ...] = ()
    """Times and the demand then."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and what the decision is based on.

    All fields except ``memory`` are attributes of the span ``ai.autoscaling.decision``.
    """

    reason: Reason
    from_replicas: int
    """The previous target."""
    to_replicas: int
    """The new target, within the bounds."""
    needed_replicas: int
    """Before the bounds are applied."""
    running_replicas: int
    reports: int
    demand: float
    """Arriving work, as the number of replicas it keeps busy."""
    queue_depth: int
    queue_wait_ms: float
    """Time the running replicas need to clear the backlog."""
    oldest_age_ms: float
    throughput: float
    """Inputs per second of one replica."""
    start_ms: float
    """How long a replica takes to start; 0 if unknown."""
    memory: Memory = field(compare=False, repr=False, default_factory=Memory)
    """Input of the next decision."""


def decide(seen: Observation, memory: Memory, goal: Goal) -> Decision:
    """Decide how many replicas there should be. Pure."""
    seen = _credible(seen)
    orders, starts = _follow_starts(seen, memory)
    usual_s = min(starts) if starts else max((report.start_ms / 1e3 for report in seen.reports), default=0.0)
    # A replica that has been starting for longer than usual shows that starts take longer now.
    start_s = max(usual_s, min(_MAX_START_S, seen.at_s - orders[0]) if orders else 0.0)
    demand, demand_now, backlog_s = _sums(seen)
    is_late = backlog_s > max(1, seen.running) * goal.queue_wait_s
    if is_late:
        # The backlog confirms that the demand of the last second is not noise.
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
    # The first decision does not know what was needed before; it assumes the current target.
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
    """Treat impossible reports as missing."""
    reports = tuple(report for report in seen.reports if report.is_credible)
    queued_calls = seen.queued_calls if math.isfinite(seen.queued_calls) and seen.queued_calls > 0 else 0.0
    return replace(
        seen, reports=reports, queued_calls=queued_calls, stale=seen.stale + len(seen.reports) - len(reports)
    )


def _sums(seen: Observation) -> tuple[float, float, float]:
    """Demand, demand of the last second, and the backlog in seconds of one replica, summed over running replicas."""
    stale = max(0, min(seen.stale, seen.running - len(seen.reports)))
    scale = 1 + stale / max(1, len(seen.reports))
    demand = sum(report.demand for report in seen.reports) * scale
    demand_now = sum(report.demand_now for report in seen.reports) * scale
    backlog_s = sum(report.queue_wait_ms for report in seen.reports) / 1e3 * scale
    # Each queued call has at least one input.
    throughput = _throughput(seen)
    return demand, demand_now, backlog_s + (seen.queued_calls / throughput if throughput > 0 else 0.0)


def _throughput(seen: Observation) -> float:
    """Inputs per second of one replica, averaged over those that have run some."""
    known = [report.throughput for report in seen.reports if report.throughput > 0]
    return sum(known) / max(1, len(known))


def _for_queue(
    seen: Observation, orders: Sequence[float], start_s: float, demand: float, backlog_s: float, queue_wait_s: float
) -> float:
    """Number of replicas that run the backlog within the accepted wait."""
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
        # Those are running now, or were cancelled because fewer are wanted.
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
    """How much demand will have grown, by its trend, when a replica has started; at most the recent demand."""
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

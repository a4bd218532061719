"""Queue to replicas: how many would keep the wait within what the operator accepts.

1. Each replica reports what waits in it, how long it would take it to run that, and how much work arrives (``Load``).
2. What arrives must not exceed ``target_utilization`` of the replicas: that many there are at least. A replica that is
   ordered comes ``start`` later, so what counts is what will arrive then, if it goes on rising as it did.
3. Where what waits takes the running replicas longer than ``target_queue_wait_ms``, there are as many as would run it
   within that time. Where a replica takes longer than that to start, it comes too late for what waits now; then there
   are as many as will, once they are there, run within another start what waits by then. Replicas that are starting
   already count for what they will have run by then. A queue that is gone before a replica has started orders none.
   A queue also says that what arrived in the last second is no accident.
4. More replicas are ordered at once, but for a twentieth more nobody is ordered. Some are given up only when for
   ``quiet_s``, and for five starts, no more were needed; then as many are kept as were needed at most in that time. So
   a pause between two bursts costs no replica, and one that is dear to start stays longer.
5. A replica whose report is old, or is no number, counts like the average of the others; one that never reported has
   nothing to do yet. Without any report nothing changes, and while inputs wait in a replica whose rate is not known, no
   replica is given up.

``decide`` is a pure function of what is seen and of what was seen before. ``QueueWaitPolicy`` is what Serve calls, ten
times a second, in its controller, which gets this module by value: it imports nothing but the standard library.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

Reason = Literal["queue", "demand", "quiet", "bounds", "at_max"]
_MARGIN_UP, _MARGIN_DOWN = 0.05, 0.1
"""Parts of the replicas by which more, or fewer, must be needed."""
_QUIET_STARTS, _TREND_STARTS = 5.0, 2.0
"""In times that a replica takes to start: the quiet before some are given up, and how far back the rise is measured."""
_MAX_QUIET_S = 600.0
"""That quiet at most, where ``quiet_s`` asks for no more: Serve's own default."""
_MAX_START_S = 600.0
"""That a replica is taken to need, at most: then it waits for room, not for itself."""
_STARTS = 3
"""The last of them that are remembered; the quickest counts: one that waited for room says nothing of the next."""
_MOST = 10**6
"""Replicas that are asked for at most."""
_INTERVAL_S = 0.4
"""Between two decisions: replicas report twice a second."""
_MOMENTS = 20
"""At which the demand is remembered, in that time."""
_NOTHING = 1e-3
"""Replicas' worth of work that is none: the trace that a request leaves in an average that forgets."""
_EXACT = 1e-9
_HUGE = 1e12
_LIMIT_EVERY_NS = 60 * 10**9
"""Between two announcements that max_replicas is too few."""
POLICY = "deployments.autoscaling:QueueWaitPolicy"
"""As serve_config.yaml names it."""
_KEY = "autoscaling_config.policy.policy_kwargs"
_logger = logging.getLogger("slowlens.autoscaling")


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica says of itself: the numbers of ``record_autoscaling_stats``."""

    queue_depth: float = 0.0
    """Inputs (in stages without batches: requests) that wait in it."""
    oldest_age_ms: float = 0.0
    """How long the first of them has waited."""
    queue_wait_ms: float = 0.0
    """How long it would take this replica to run all that waits in it, at the rate that it is seen to run."""
    demand: float = 0.0
    """Seconds of its work that arrive per second, refused requests included: of the last seconds. Above 1 it cannot
    keep up."""
    demand_now: float = 0.0
    """The same of the last second."""
    throughput: float = 0.0
    """Inputs a second that it can run, as it is seen to run them."""
    start_ms: float = 0.0
    """How long it took from the start of its constructor until it was ready."""

    def stats(self) -> dict[str, float]:
        return asdict(self)

    @property
    def is_credible(self) -> bool:
        # Written out: there may be thousands, several times a second. Infinity or NaN in one of them is in the sum.
        values = (
            self.queue_depth,
            self.oldest_age_ms,
            self.queue_wait_ms,
            self.demand,
            self.demand_now,
            self.throughput,
            self.start_ms,
        )
        return min(values) >= 0 and math.isfinite(sum(values))


@dataclass(frozen=True, slots=True)
class Goal:
    """What the operator wants."""

    queue_wait_s: float
    utilization: float = 0.8
    quiet_s: float = 60.0
    min_replicas: int = 1
    max_replicas: int = 2**31


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen at one moment."""

    at_s: float
    """On a clock that only goes forward."""
    running: int
    target: int
    """Replicas that are ordered, running ones included."""
    loads: tuple[Load, ...]
    """Of the running replicas that reported lately."""
    calls: float = 0.0
    """That wait in the callers, because every replica has as many as it may (``max_ongoing_requests``)."""
    stale: int = 0
    """Running replicas that reported before, but not lately."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What was seen before. The first one is empty."""

    needs: tuple[tuple[float, int], ...] = ()
    """When how many replicas were needed, within ``quiet_s``; only what a later need does not exceed."""
    orders: tuple[float, ...] = ()
    """When each replica was ordered that does not run yet, the oldest first."""
    starts: tuple[float, ...] = ()
    """How many seconds those took that came last."""
    running: int = 0
    past: tuple[tuple[float, float], ...] = ()
    """Moments and the demand then."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and what that was decided on."""

    replicas: int
    """Within the bounds."""
    needed: int
    """Without bounds."""
    reason: Reason
    running: int
    target: int
    reports: int
    demand: float
    """Replicas' worth of work that arrives."""
    queue_depth: float
    queue_wait_ms: float
    """How long the running replicas need for all that waits."""
    oldest_age_ms: float
    throughput: float
    """Inputs a second, of one replica."""
    start_s: float
    """How long a replica takes to start; 0 where that is not known."""
    memory: Memory = field(compare=False, repr=False, default_factory=Memory)
    """For the next decision."""


def decide(sight: Sight, memory: Memory, goal: Goal) -> Decision:
    """The replicas that there should be. Pure."""
    sight = _credible(sight)
    orders, starts = _follow_orders(sight, memory)
    usual_s = min(starts) if starts else max((load.start_ms / 1e3 for load in sight.loads), default=0.0)
    # What is on its way for longer than replicas usually take says that they take longer now.
    start_s = max(usual_s, min(_MAX_START_S, sight.at_s - orders[0]) if orders else 0.0)
    demand, demand_now, backlog_s = _sums(sight)
    is_late = backlog_s > max(1, sight.running) * goal.queue_wait_s
    if is_late:
        # What waits says that the last second is no accident.
        demand = max(demand, demand_now)
    past = _remember_demand(memory.past, sight.at_s, demand, _TREND_STARTS * usual_s) if sight.loads else memory.past
    if sight.loads:
        least = (demand + _rise(past, usual_s)) / goal.utilization if demand > _NOTHING else 0.0
        by_queue = _for_queue(sight, orders, start_s, demand, backlog_s, goal.queue_wait_s) if is_late else 0.0
        needed: int = max(math.ceil(min(max(least, by_queue), _MOST) - _EXACT), 1 if backlog_s > 0 else 0)
        reason: Reason = "queue" if by_queue > least else "demand"
        if any(load.queue_depth > 0 and load.throughput == 0 for load in sight.loads):
            needed = max(needed, sight.target, 1)
    else:
        needed, reason = sight.target, "bounds"
    # Whoever looks for the first time does not know what was needed before: what there is.
    quiet_s = max(goal.quiet_s, min(_MAX_QUIET_S, _QUIET_STARTS * usual_s))
    needs = _remember(memory.needs or ((sight.at_s, sight.target),), sight.at_s, needed, quiet_s)
    most = max(count for _, count in needs)
    kept = sight.target
    if needed > sight.target and (is_late or needed >= sight.target * (1 + _MARGIN_UP)):
        kept = needed
    elif most <= sight.target * (1 - _MARGIN_DOWN):
        kept, reason = most, "quiet"
    replicas = min(max(kept, goal.min_replicas), goal.max_replicas)
    if replicas != kept:
        reason = "at_max" if kept > goal.max_replicas else "bounds"
    return Decision(
        replicas=replicas,
        needed=needed,
        reason=reason,
        running=sight.running,
        target=sight.target,
        reports=len(sight.loads),
        demand=demand,
        queue_depth=sum(load.queue_depth for load in sight.loads),
        queue_wait_ms=backlog_s / max(1, sight.running) * 1e3,
        oldest_age_ms=max((load.oldest_age_ms for load in sight.loads), default=0.0),
        throughput=_throughput(sight),
        start_s=start_s,
        memory=Memory(needs, orders, starts, sight.running, past),
    )


def _credible(sight: Sight) -> Sight:
    """Reports that cannot be true count as none."""
    loads = tuple(load for load in sight.loads if load.is_credible)
    calls = sight.calls if math.isfinite(sight.calls) and sight.calls > 0 else 0.0
    return replace(sight, loads=loads, calls=calls, stale=sight.stale + len(sight.loads) - len(loads))


def _sums(sight: Sight) -> tuple[float, float, float]:
    """Demand, that of the last second, and seconds of one replica's work that wait, over all running replicas."""
    stale = max(0, min(sight.stale, sight.running - len(sight.loads)))
    like = 1 + stale / max(1, len(sight.loads))
    demand = sum(load.demand for load in sight.loads) * like
    demand_now = sum(load.demand_now for load in sight.loads) * like
    backlog_s = sum(load.queue_wait_ms for load in sight.loads) / 1e3 * like
    # An input or more in each of the calls.
    throughput = _throughput(sight)
    return demand, demand_now, backlog_s + (sight.calls / throughput if throughput > 0 else 0.0)


def _throughput(sight: Sight) -> float:
    """Inputs a second, of one replica that has run some."""
    known = [load.throughput for load in sight.loads if load.throughput > 0]
    return sum(known) / max(1, len(known))


def _for_queue(
    sight: Sight, orders: Sequence[float], start_s: float, demand: float, backlog_s: float, queue_wait_s: float
) -> float:
    """Replicas that run what waits in time."""
    if start_s <= queue_wait_s:
        return backlog_s / queue_wait_s
    running = max(1, sight.running)
    ahead_s = sum(min(start_s, sight.at_s - ordered) for ordered in orders)
    then_s = backlog_s + (demand - running) * start_s - ahead_s
    left_s = then_s - (running + len(orders)) * queue_wait_s
    return demand + left_s / start_s if left_s > 0 else 0.0


def _follow_orders(sight: Sight, memory: Memory) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The replicas that are on their way, and how long those took that came last."""
    orders, starts = memory.orders, memory.starts
    missing = max(0, sight.target - sight.running)
    gone = len(orders) - missing
    if gone > 0:
        # Those came, or were given up because fewer are wanted.
        if sight.running > memory.running:
            starts = (*starts, min(_MAX_START_S, sight.at_s - orders[0]))[-_STARTS:]
        orders = orders[gone:]
    return orders + (sight.at_s,) * max(0, -gone), starts


def _remember_demand(
    past: tuple[tuple[float, float], ...], now_s: float, demand: float, span_s: float
) -> tuple[tuple[float, float], ...]:
    """What arrived, at some moments of the last ``span_s`` seconds."""
    if past and now_s - past[-1][0] < span_s / _MOMENTS:
        return past
    return *((at_s, value) for at_s, value in past if at_s > now_s - span_s), (now_s, demand)


def _rise(past: Sequence[tuple[float, float]], start_s: float) -> float:
    """By how much more will arrive when a replica has started, if it goes on as it did; at most as much again."""
    if len(past) < _MOMENTS // 2:
        return 0.0
    quarter = len(past) // 4
    before, after = past[:quarter], past[-quarter:]
    rise = sum(v for _, v in after) / quarter - sum(v for _, v in before) / quarter
    took_s = sum(t for t, _ in after) / quarter - sum(t for t, _ in before) / quarter
    return min(max(0.0, rise * start_s / took_s), sum(v for _, v in after) / quarter)


def _remember(
    needs: Sequence[tuple[float, int]], now_s: float, needed: int, quiet_s: float
) -> tuple[tuple[float, int], ...]:
    """A later need that is as large makes an earlier one forgotten."""
    kept = [(at_s, count) for at_s, count in needs if at_s > now_s - quiet_s and count > needed]
    return *kept, (now_s, needed)


# --- what Serve calls ------------------------------------------------------------------------------------------------

_FIELDS = tuple(one.name for one in fields(Load))


@dataclass(frozen=True, slots=True)
class Announcement:
    """A decision as it is told to operators. Times are Unix nanoseconds."""

    application: str
    deployment: str
    seen_unix_ns: int
    """When the newest report that it was made on was taken, by the clock of its replica."""
    decided_unix_ns: int
    max_replicas: int
    target_queue_wait_ms: float
    decision: Decision

    def flat(self) -> dict[str, Any]:
        """The fields of a ScalingRecord."""
        made = self.decision
        return {
            "application": self.application,
            "deployment": self.deployment,
            "seen_unix_ns": self.seen_unix_ns,
            "decided_unix_ns": self.decided_unix_ns,
            "reason": made.reason,
            "from_replicas": made.target,
            "to_replicas": made.replicas,
            "needed_replicas": made.needed,
            "max_replicas": self.max_replicas,
            "running_replicas": made.running,
            "reports": made.reports,
            "demand": made.demand,
            "queue_depth": made.queue_depth,
            "queue_wait_ms": made.queue_wait_ms,
            "target_queue_wait_ms": self.target_queue_wait_ms,
            "oldest_age_ms": made.oldest_age_ms,
            "throughput": made.throughput,
            "start_ms": made.start_s * 1e3,
        }

    def __str__(self) -> str:
        made = self.decision
        limit = f", and max_replicas is {self.max_replicas}" if made.reason == "at_max" else ""
        return (
            f"{self.deployment}: {made.target} -> {made.replicas} ({made.reason}, {made.needed} needed{limit}), "
            f"{made.running} run, {made.reports} of them reported; {made.queue_depth:.0f} inputs wait, which takes "
            f"them {made.queue_wait_ms:.0f} ms of {self.target_queue_wait_ms:g} ms; the oldest has waited "
            f"{made.oldest_age_ms:.0f} ms; what arrives is the work of {made.demand:.2f} replicas, each of which runs "
            f"{made.throughput:.1f} inputs a second; a replica starts in {made.start_s:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """``policy_kwargs`` of the policy, in serve_config.yaml."""

    target_queue_wait_ms: float
    target_utilization: float = 0.8
    quiet_s: float = 60.0
    stale_s: float = 10.0
    telemetry_directory: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Raises ValueError, with a line for each wrong key, naming the key, the rule and the value."""
        problems = list(_problems(given))
        if problems:
            raise ValueError("\n  ".join(problems))
        return cls(**given)


class QueueWaitPolicy:
    """``autoscaling_config.policy.policy_function``, named as ``POLICY``.

    Set ``upscale_delay_s`` and ``downscale_delay_s`` to 0 beside it: Serve would wait so long after each decision. The
    log of Serve's controller, metrics and spans say what was decided, and on what. With wrong settings it changes
    nothing and says so: an exception would stop Serve's controller for all applications. The replicas refuse to start
    with them.

    Args, in ``policy_kwargs``:
        target_queue_wait_ms: the wait before the device that is accepted.
        target_utilization: how much of what the replicas can run may arrive, above 0 and at most 1.
        quiet_s: for so long no more replicas were needed before some are given up.
        stale_s: a report that is older counts as none.
        telemetry_directory: the local store, where ``telemetry.directory`` of the application names one.
    """

    def __init__(self, **policy_kwargs: Any) -> None:
        try:
            self._settings: Settings | None = Settings.parse(policy_kwargs)
        except ValueError as error:
            self._settings = None
            _set_up_logging()
            _logger.error("not scaled: %s", error)
        self._memory = Memory()
        self._wanted, self._target, self._again_at_s = 0, 0, float("-inf")
        self._reported: dict[Any, tuple[float, float]] = {}
        self._announced: tuple[int, int] | None = None
        self._limit_told_ns = 0
        self._has_failed = False
        self._tell: Callable[[Announcement, bool], None] | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """``ctx`` is Serve's AutoscalingContext."""
        settings = self._settings
        if settings is None:
            return ctx.target_num_replicas, {}
        now_s = time.monotonic()
        if now_s < self._again_at_s:
            # Nothing new has been reported since; of thousands of replicas even the reading takes time. Serve may have
            # changed its mind: from zero it starts the first replica itself.
            return self._wanted if ctx.target_num_replicas == self._target else ctx.target_num_replicas, {}
        self._again_at_s = now_s + _INTERVAL_S
        self._wanted = self._target = ctx.target_num_replicas
        try:
            self._wanted = self._decide(ctx, settings, now_s)
        except Exception:
            if not self._has_failed:
                _logger.exception("%s: not scaled", ctx.deployment_name)
            self._has_failed = True
        return self._wanted, {}

    def _decide(self, ctx: Any, settings: Settings, now_s: float) -> int:
        loads, stale, newest_s = self._loads(ctx, now_s, settings.stale_s)
        goal = Goal(
            settings.target_queue_wait_ms / 1e3,
            settings.target_utilization,
            settings.quiet_s,
            ctx.capacity_adjusted_min_replicas,
            ctx.capacity_adjusted_max_replicas,
        )
        calls = float(ctx.total_queued_requests or 0.0)
        sight = Sight(now_s, ctx.current_num_replicas, ctx.target_num_replicas, loads, calls, stale)
        made = decide(sight, self._memory, goal)
        self._memory = made.memory
        self._announce(ctx, made, goal, newest_s)
        return made.replicas

    def _loads(self, ctx: Any, now_s: float, stale_s: float) -> tuple[tuple[Load, ...], int, float]:
        """The fresh reports, how many are stale, and when the newest was taken, by its replica's clock (0 of none)."""
        series: Mapping[str, Mapping[Any, Sequence[Any]]] = ctx.raw_metrics or {}
        last = {replica: points[-1].timestamp for replica, points in series.get(_FIELDS[0], {}).items() if points}
        # Clocks of two machines are never compared: a report is as old as it is here.
        seen = {replica: self._reported.get(replica, (math.nan, now_s)) for replica in last}
        self._reported = {
            replica: seen[replica] if seen[replica][0] == taken_s else (taken_s, now_s)
            for replica, taken_s in last.items()
        }
        fresh = [replica for replica, (_, came_s) in self._reported.items() if now_s - came_s < stale_s]
        loads = tuple(Load(**{name: _last(series.get(name, {}).get(replica)) for name in _FIELDS}) for replica in fresh)
        return loads, len(last) - len(fresh), max((last[replica] for replica in fresh), default=0.0)

    # --- telling ---

    def _announce(self, ctx: Any, made: Decision, goal: Goal, newest_s: float) -> None:
        """Every call shows; a change of mind is told, once."""
        now_ns = time.time_ns()
        announcement = Announcement(
            ctx.app_name or "",
            ctx.deployment_name,
            int(newest_s * 1e9) or now_ns,
            now_ns,
            goal.max_replicas,
            goal.queue_wait_s * 1e3,
            made,
        )
        change = (made.target, made.replicas)
        # Serve may follow late; and who is at the limit stays there for a while.
        is_news = made.replicas != made.target and change != self._announced
        self._announced = change
        if made.reason == "at_max" and now_ns >= self._limit_told_ns + _LIMIT_EVERY_NS:
            is_news, self._limit_told_ns = True, now_ns
        if self._tell is None:
            assert self._settings is not None
            self._tell = _start_telling(self, self._settings.telemetry_directory)
            _warn_of_delays(ctx)
        self._tell(announcement, is_news)


def _last(points: Sequence[Any] | None) -> float:
    return float(points[-1].value) if points else 0.0


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    known = [one.name for one in fields(Settings)]
    for key in given:
        if key not in known:
            yield f"{_KEY}.{key}: unknown key; known here: {', '.join(known)}"
    if "target_queue_wait_ms" not in given:
        yield f"{_KEY}.target_queue_wait_ms: must be given: the wait that is accepted, in milliseconds"
    rules: dict[str, tuple[str, Callable[[float], bool]]] = {
        "target_queue_wait_ms": ("above 0", lambda value: value / 1e3 > 0),
        "target_utilization": ("above 0 and at most 1", lambda value: 0 < value <= 1),
        "quiet_s": ("0 or more", lambda value: value >= 0),
        "stale_s": ("above 0", lambda value: value > 0),
    }
    for key, (rule, is_right) in rules.items():
        value = given.get(key, 1)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE
        if not (is_number and is_right(value)):
            yield f"{_KEY}.{key}: must be a number {rule}; got {value!r}"
    directory = given.get("telemetry_directory")
    if not isinstance(directory, str | None):
        yield f"{_KEY}.telemetry_directory: must be a path; got {directory!r}"


def _warn_of_delays(ctx: Any) -> None:
    for key in ("upscale_delay_s", "downscale_delay_s"):
        delay_s = getattr(ctx.config, key, 0)
        if delay_s:
            _logger.warning("%s: Serve follows each decision %s s late (%s)", ctx.deployment_name, delay_s, key)


def _start_telling(policy: QueueWaitPolicy, directory: str | None) -> Callable[[Announcement, bool], None]:
    """A thread that logs and exports, until the policy is gone: the controller waits for nothing."""
    _set_up_logging()
    told: queue.SimpleQueue[tuple[Announcement, bool] | None] = queue.SimpleQueue()
    threading.Thread(target=_tell_all, args=(told, directory), name="slowlens-autoscaling", daemon=True).start()
    weakref.finalize(policy, told.put, None)
    return lambda announcement, is_news: told.put((announcement, is_news))


def _set_up_logging() -> None:
    """Serve's own loggers are the only ones that its controller sets up."""
    if not _logger.handlers:
        _logger.addHandler(logging.StreamHandler(sys.stderr))
        _logger.setLevel(logging.INFO)


def _tell_all(told: queue.SimpleQueue[tuple[Announcement, bool] | None], directory: str | None) -> None:
    telemetry: Any = None
    last: tuple[str, str] | None = None
    try:
        # Not above: the controller must not wait for OpenTelemetry, and may have been given this module alone.
        import ray

        from deployments.telemetry.decisions import ScalingRecord, decision_telemetry

        telemetry = decision_telemetry(directory, ray.get_runtime_context().get_node_id())
    except Exception as error:
        _logger.warning("decisions are only logged, not exported: %r", error)
    while (item := told.get()) is not None:
        announcement, is_news = item
        if is_news:
            _logger.info("%s", announcement)
        if telemetry is not None:
            last = announcement.application, announcement.deployment
            try:
                telemetry.take(ScalingRecord(**announcement.flat()), is_news)
            except Exception as error:
                _logger.warning("a decision is not exported: %r", error)
    if telemetry is not None and last is not None:
        telemetry.forget(*last)

"""The policy that Serve's controller calls ten times a second: an adapter around ``decide``.

Serve pickles the policy by value, so this package imports only the standard library until it announces a decision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from deployments.autoscaling.announce import Announce, Announcement, logger, set_up_logging, start_announcing
from deployments.autoscaling.decide import Decision, Goal, Memory, Observation, decide
from deployments.autoscaling.report import LoadReport
from deployments.autoscaling.settings import PolicySettings

_INTERVAL_S = 0.4
"""Minimum time between two decisions: replicas report twice a second."""
_LIMIT_EVERY_NS = 60 * 10**9
"""Minimum time between two announcements that max_replicas is too low."""
_FIELDS = tuple(one.name for one in fields(LoadReport))


class QueueWaitPolicy:
    """``autoscaling_config.policy.policy_function``, as ``settings.POLICY`` names it.

    Also set ``upscale_delay_s`` and ``downscale_delay_s`` to 0; otherwise Serve waits that long after each decision.
    The log of Serve's controller, metrics and spans show each decision and its inputs. With invalid settings the policy
    changes nothing and logs an error: an exception would stop Serve's controller for all applications. The replicas
    refuse to start with invalid settings.

    Args, in ``policy_kwargs``:
        target_queue_wait_ms: the accepted wait for the device.
        target_utilization: fraction of the replicas' capacity that arriving work may use, above 0 and at most 1.
        quiet_s: how long fewer replicas must have been enough before some are removed.
        stale_s: age at which a report is stale.
        telemetry_directory: the local store, if ``telemetry.directory`` of the application sets one.
    """

    # For tests to replace.
    start_announcing = staticmethod(start_announcing)
    monotonic_s = staticmethod(time.monotonic)
    unix_ns = staticmethod(time.time_ns)

    def __init__(self, **policy_kwargs: Any) -> None:
        try:
            self.settings: PolicySettings | None = PolicySettings.parse(policy_kwargs)
        except ValueError as error:
            self.settings = None
            set_up_logging()
            logger.error("not scaled: %s", error)
        self._memory = Memory()
        self._wanted, self._target, self._again_at_s = 0, 0, float("-inf")
        self._reported: dict[Any, tuple[float, float]] = {}
        self._announced: tuple[int, int] | None = None
        self._limit_announced_ns = 0
        self._has_failed = False
        self._announce: Announce | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """``ctx`` is Serve's AutoscalingContext."""
        settings = self.settings
        if settings is None:
            return ctx.target_num_replicas, {}
        now_s = self.monotonic_s()
        if now_s < self._again_at_s:
            # Nothing new has been reported since, and with thousands of replicas just reading the reports takes time.
            # Serve may have changed the target: from zero it starts the first replica itself.
            return self._wanted if ctx.target_num_replicas == self._target else ctx.target_num_replicas, {}
        self._again_at_s = now_s + _INTERVAL_S
        self._wanted = self._target = ctx.target_num_replicas
        try:
            self._wanted = self._decide(ctx, settings, now_s)
        except Exception:
            if not self._has_failed:
                logger.exception("%s: not scaled", ctx.deployment_name)
            self._has_failed = True
        return self._wanted, {}

    def _decide(self, ctx: Any, settings: PolicySettings, now_s: float) -> int:
        reports, stale, newest_s = self._reports(ctx, now_s, settings.stale_s)
        goal = Goal(
            settings.target_queue_wait_ms / 1e3,
            settings.target_utilization,
            settings.quiet_s,
            ctx.capacity_adjusted_min_replicas,
            ctx.capacity_adjusted_max_replicas,
        )
        queued_calls = float(ctx.total_queued_requests or 0.0)
        seen = Observation(now_s, ctx.current_num_replicas, ctx.target_num_replicas, reports, queued_calls, stale)
        made = decide(seen, self._memory, goal)
        self._memory = made.memory
        self._tell_operators(ctx, made, goal, newest_s)
        return made.to_replicas

    def _reports(self, ctx: Any, now_s: float, stale_s: float) -> tuple[tuple[LoadReport, ...], int, float]:
        """The fresh reports, how many are stale, and when the newest was taken, by its replica's clock (0 if none)."""
        series: Mapping[str, Mapping[Any, Sequence[Any]]] = ctx.raw_metrics or {}
        last = {replica: points[-1].timestamp for replica, points in series.get(_FIELDS[0], {}).items() if points}
        # Clocks of two machines are never compared: a report's age counts from when it was first seen here.
        seen = {replica: self._reported.get(replica, (math.nan, now_s)) for replica in last}
        self._reported = {
            replica: seen[replica] if seen[replica][0] == taken_s else (taken_s, now_s)
            for replica, taken_s in last.items()
        }
        fresh = [replica for replica, (_, came_s) in self._reported.items() if now_s - came_s < stale_s]
        reports = tuple(
            LoadReport(**{name: _last(series.get(name, {}).get(replica)) for name in _FIELDS}) for replica in fresh
        )
        return reports, len(last) - len(fresh), max((last[replica] for replica in fresh), default=0.0)

    def _tell_operators(self, ctx: Any, made: Decision, goal: Goal, newest_s: float) -> None:
        """Announce the decision. Every decision updates the gauges; each change is news only once."""
        now_ns = self.unix_ns()
        announcement = Announcement(
            ctx.app_name or "",
            ctx.deployment_name,
            int(newest_s * 1e9) or now_ns,
            now_ns,
            goal.max_replicas,
            goal.queue_wait_s * 1e3,
            made,
        )
        change = (made.from_replicas, made.to_replicas)
        # Serve may apply it late, and a deployment at its limit stays there for a while.
        is_news = made.to_replicas != made.from_replicas and change != self._announced
        self._announced = change
        if made.reason == "at_max" and now_ns >= self._limit_announced_ns + _LIMIT_EVERY_NS:
            is_news, self._limit_announced_ns = True, now_ns
        if self._announce is None:
            assert self.settings is not None
            self._announce = self.start_announcing(self, self.settings.telemetry_directory)
            _warn_of_delays(ctx)
        self._announce(announcement, is_news)


def _last(points: Sequence[Any] | None) -> float:
    return float(points[-1].value) if points else 0.0


def _warn_of_delays(ctx: Any) -> None:
    for key in ("upscale_delay_s", "downscale_delay_s"):
        delay_s = getattr(ctx.config, key, 0)
        if delay_s:
            logger.warning("%s: Serve applies each decision %s s late (%s)", ctx.deployment_name, delay_s, key)

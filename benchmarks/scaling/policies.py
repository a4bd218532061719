"""The compared policies, behind one interface."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from simulation import Seen, Setup

from deployments.autoscaling.decide import Goal, Memory, Observation, decide
from deployments.autoscaling.report import LoadReport


class QueueWait:
    """The policy of ``deployments.autoscaling.policy``."""

    name = "slowlens"

    def __init__(self, quiet_s: float = 60.0) -> None:
        self._memory, self._quiet_s = Memory(), quiet_s

    def replicas(self, seen: Seen, setup: Setup) -> int:
        loads = tuple(
            LoadReport(
                queue_depth=queued,
                queue_wait_ms=queued / setup.rate * 1e3,
                demand=arriving / setup.rate,
                demand_now=now / setup.rate,
                throughput=setup.rate,
                # A replica knows only how long its model took to load, not how long its node took to start.
                start_ms=setup.start_s * 500,
            )
            for queued, arriving, now in zip(
                seen.queued.tolist(), seen.arriving.tolist(), seen.arriving_now.tolist(), strict=True
            )
        )
        goal = Goal(
            setup.target_wait_s,
            quiet_s=self._quiet_s,
            min_replicas=setup.min_replicas,
            max_replicas=setup.max_replicas,
        )
        made = decide(Observation(seen.at_s, seen.running, seen.target, loads), self._memory, goal)
        self._memory = made.memory
        return made.to_replicas


@dataclass
class ServeDefault:
    """Serve's own policy, run from Serve's code with the clock of the simulation.

    ``target_ongoing_requests`` is the number of requests that a replica may have in flight for the wait to stay within
    the target: the number it runs in that time. Serve's default of 2 would be less than one batch.
    """

    name: str
    look_back_s: float = 30.0
    push_s: float = 10.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0

    def __post_init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._ongoing: deque[tuple[float, float]] = deque()
        self._pushed = (-math.inf, 0.0)
        self._policy = autoscaling_policy._apply_autoscaling_config(
            autoscaling_policy.replica_queue_length_autoscaling_policy
        )

    def replicas(self, seen: Seen, setup: Setup) -> int:
        # In flight are waiting and running requests: a busy replica has one run's worth running.
        running = float((seen.arriving > 0).sum()) * setup.rate * 0.05
        self._ongoing.append((seen.at_s, float(seen.queued.sum()) + running))
        while self._ongoing[0][0] < seen.at_s - self.look_back_s:
            self._ongoing.popleft()
        if seen.at_s - self._pushed[0] >= self.push_s:
            self._pushed = seen.at_s, sum(value for _, value in self._ongoing) / len(self._ongoing)
        config = AutoscalingConfig(
            min_replicas=setup.min_replicas,
            max_replicas=setup.max_replicas,
            target_ongoing_requests=setup.target_wait_s * setup.rate,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
        )
        ctx = AutoscalingContext(
            deployment_id=DeploymentID("Model", ""),
            deployment_name="Model",
            app_name="",
            current_num_replicas=seen.running,
            target_num_replicas=seen.target,
            running_replicas=[],
            total_num_requests=self._pushed[1],
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=setup.min_replicas,
            capacity_adjusted_max_replicas=setup.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=seen.at_s,
            config=config,
        )
        # Serve's policy measures its delays with the wall clock.
        with mock.patch("ray.serve.autoscaling_policy.time.time", return_value=seen.at_s):
            wanted, self._state = self._policy(ctx)
        return math.ceil(wanted)


def serve_default() -> ServeDefault:
    return ServeDefault("Serve's default")


def serve_quick() -> ServeDefault:
    """Serve's policy with settings that make it react as fast as possible."""
    return ServeDefault("Serve's, quick", 2.0, 0.5, 0.0, 60.0)

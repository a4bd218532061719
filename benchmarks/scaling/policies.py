"""The compared policies, each as Serve calls it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext


@dataclass
class ServeDefault:
    """Serve's own policy, run from Serve's code with the clock of the replay.

    ``ongoing`` is ``target_ongoing_requests``: the number of requests that a replica may have in flight for the wait to
    stay within the target, which is the number that it runs in that time. Serve's default of 2 would be less than one
    batch.
    """

    ongoing: float
    look_back_s: float = 30.0
    push_s: float = 10.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0

    def __post_init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._seen: deque[tuple[float, float]] = deque()
        self._pushed = (float("-inf"), 0.0)
        self._policy = autoscaling_policy._apply_autoscaling_config(
            autoscaling_policy.replica_queue_length_autoscaling_policy
        )

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        now_s = ctx.current_time
        self._seen.append((now_s, float(ctx.total_num_requests)))
        while self._seen[0][0] < now_s - self.look_back_s:
            self._seen.popleft()
        if now_s - self._pushed[0] >= self.push_s:
            self._pushed = now_s, sum(value for _, value in self._seen) / len(self._seen)
        config = AutoscalingConfig(
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
            target_ongoing_requests=self.ongoing,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
        )
        of_serve = AutoscalingContext(
            deployment_id=DeploymentID("Model", ""),
            deployment_name="Model",
            app_name="",
            current_num_replicas=ctx.current_num_replicas,
            target_num_replicas=ctx.target_num_replicas,
            running_replicas=[],
            total_num_requests=self._pushed[1],
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=ctx.capacity_adjusted_min_replicas,
            capacity_adjusted_max_replicas=ctx.capacity_adjusted_max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=config,
        )
        # Serve's policy measures its delays with the wall clock.
        with mock.patch("ray.serve.autoscaling_policy.time.time", return_value=now_s):
            wanted, self._state = self._policy(of_serve)
        return wanted, self._state


def serve_quick(ongoing: float) -> ServeDefault:
    """Serve's policy with settings that make it react as fast as possible."""
    return ServeDefault(ongoing, 2.0, 0.5, 0.0, 60.0)

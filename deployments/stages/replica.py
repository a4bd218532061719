"""Startup steps of every stage: check its settings in Serve, query its placement from Ray, and tune the process."""

from __future__ import annotations

import gc
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingPolicy
from ray.serve.context import ReplicaContext

from deployments.autoscaling.settings import POLICY, PolicySettings
from deployments.errors import ConfigError
from deployments.telemetry.export.provider import ReplicaIdentity

_GC_THRESHOLD = 20_000
_SERVES_DEFAULT = AutoscalingPolicy().policy_function  # type: ignore[no-untyped-call]
DEFAULT_MAX_ONGOING_REQUESTS = 4000
"""More than the gate admits (batching.max_queue), so that requests wait and are rejected in the gate, where this is
traced, not in front of it. Serve's default of 5 would starve the batches."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Identity and resources that Ray assigned to this replica."""

    identity: ReplicaIdentity
    app_name: str
    cpus: float
    gpus: tuple[str, ...]
    """Its GPUs as CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""
    host: str = "127.0.0.1"
    """Address of its node, as Ray knows it."""
    max_ongoing_requests: int = DEFAULT_MAX_ONGOING_REQUESTS
    is_own_process: bool = False
    """Whether the process is the replica's alone, as under Serve."""


class Stoppable:
    """A stage that Serve can stop. Its constructor sets ``_is_open`` when it has something to stop."""

    _is_open = False

    async def close(self) -> None:
        """Stop, once."""
        if self._is_open:
            self._is_open = False
            await self._stop()

    async def _stop(self) -> None:
        raise NotImplementedError

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Called by Serve when it stops the replica; it awaits what this returns, up to the grace period."""
        return self.close() if self._is_open else None


def prepare_replica(*, has_channel: bool = True) -> Placement:
    """Run all startup steps in a replica. Raises ConfigError.

    Args:
        has_channel: whether its requests come through a channel, and not through Serve.
    """
    context = serve.get_replica_context()
    check_policy(context, has_channel=has_channel)
    return placement_of(context)


def check_policy(context: ReplicaContext, *, has_channel: bool = True) -> None:
    """Raise ConfigError, naming the key, if the policy by which the deployment is scaled cannot work.

    That is ours with invalid settings, which Serve's controller only receives and cannot reject; or, for a deployment
    with a channel, Serve's default, which counts calls by Serve's handles.
    """
    policy = getattr(getattr(_deployment_config(context), "autoscaling_config", None), "policy", None)
    if policy is None:
        return
    if policy.policy_function == POLICY:
        try:
            PolicySettings.parse(policy.policy_kwargs)
        except ValueError as error:
            raise ConfigError(f"deployments.{context.deployment}.{error}") from None
    elif has_channel and policy.policy_function == _SERVES_DEFAULT:
        raise ConfigError(
            f"deployments.{context.deployment}.autoscaling_config.policy: Serve's default policy counts calls by "
            f"Serve's handles, and this deployment gets none; set policy_function: {POLICY}, or num_replicas"
        )


def tune_garbage_collector() -> None:
    """Collect cycles less often: a request allocates some hundred objects and leaves none behind.

    At the default threshold of 700, collection costs 5 % of a replica. Call this when everything is loaded: what is
    there now stays, and is not looked at again. Ray asks for a full collection from time to time, which would stop the
    replica for as long as it takes to look at all that torch and transformers have loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


def placement_of(context: ReplicaContext) -> Placement:
    ray_context = ray.get_runtime_context()
    return Placement(
        identity=ReplicaIdentity(
            context.replica_id.to_full_id_str(), ray_context.get_node_id(), dict(_scheduling(context))
        ),
        app_name=context.app_name,
        cpus=float(ray_context.get_assigned_resources().get("CPU", 1.0)),  # type: ignore[no-untyped-call]
        gpus=tuple(str(device) for device in ray_context.get_accelerator_ids().get("GPU", ())),
        host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        max_ongoing_requests=getattr(_deployment_config(context), "max_ongoing_requests", DEFAULT_MAX_ONGOING_REQUESTS),
        is_own_process=True,
    )


def _scheduling(context: ReplicaContext) -> Iterator[tuple[str, float]]:
    """Settings by which Serve schedules this deployment; yields nothing if they moved."""
    config = _deployment_config(context)
    autoscaling = getattr(config, "autoscaling_config", None)
    known = {
        "num_replicas": None if autoscaling is not None else getattr(config, "num_replicas", None),
        "max_ongoing_requests": getattr(config, "max_ongoing_requests", None),
        "autoscaling_config.min_replicas": getattr(autoscaling, "min_replicas", None),
        "autoscaling_config.max_replicas": getattr(autoscaling, "max_replicas", None),
    }
    policy = getattr(autoscaling, "policy", None)
    if policy is not None and policy.policy_function == POLICY:
        known |= {f"autoscaling_config.policy.policy_kwargs.{key}": v for key, v in policy.policy_kwargs.items()}
    for key, value in known.items():
        if isinstance(value, int | float):
            yield f"deployments.{context.deployment}.{key}", value


def _deployment_config(context: ReplicaContext) -> Any:
    """The deployment's settings in Serve, which have no public API; None if they moved."""
    return getattr(context, "_deployment_config", None)

"""Startup steps of every stage: check its settings in Serve, tune the process, and query its placement from Ray."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import ReplicaContext

from deployments.autoscaling.settings import POLICY, PolicySettings
from deployments.errors import ConfigError
from deployments.telemetry.export.provider import ReplicaIdentity

_GC_THRESHOLD = 20_000


@dataclass(frozen=True, slots=True)
class Placement:
    """Identity and resources that Ray assigned to this replica."""

    identity: ReplicaIdentity
    app_name: str
    cpus: float
    gpus: tuple[str, ...]
    """Its GPUs as CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""


def prepare_replica() -> Placement:
    """Run all startup steps in a replica. Raises ConfigError."""
    context = serve.get_replica_context()
    check_policy(context)
    tune_garbage_collector()
    return placement_of(context)


def check_policy(context: ReplicaContext) -> None:
    """Raise ConfigError, naming the key, if the deployment is scaled by slowlens' policy and its settings are invalid.

    Serve's controller only receives the policy and cannot reject it.
    """
    config: Any = getattr(context, "_deployment_config", None)
    policy = getattr(getattr(config, "autoscaling_config", None), "policy", None)
    if policy is not None and policy.policy_function == POLICY:
        try:
            PolicySettings.parse(policy.policy_kwargs)
        except ValueError as error:
            raise ConfigError(f"deployments.{context.deployment}.{error}") from None


def tune_garbage_collector() -> None:
    """Collect cycles less often: a request allocates some hundred objects and leaves none behind.

    At the default threshold of 700, collection costs 5 % of a replica.
    """
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
    )


def _scheduling(context: ReplicaContext) -> Iterator[tuple[str, float]]:
    """Settings by which Serve schedules this deployment. They have no public API; yields nothing if they moved."""
    config: Any = getattr(context, "_deployment_config", None)
    autoscaling = getattr(config, "autoscaling_config", None)
    known = {
        "num_replicas": None if autoscaling is not None else getattr(config, "num_replicas", None),
        "max_ongoing_requests": getattr(config, "max_ongoing_requests", None),
        "autoscaling_config.min_replicas": getattr(autoscaling, "min_replicas", None),
        "autoscaling_config.max_replicas": getattr(autoscaling, "max_replicas", None),
    }
    for key, value in known.items():
        if isinstance(value, int | float):
            yield f"deployments.{context.deployment}.{key}", value

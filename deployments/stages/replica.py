"""Who and where this replica is, asked of Ray once, at start."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import ReplicaContext

from deployments.autoscaling.policy import POLICY, Settings
from deployments.errors import ConfigError
from deployments.telemetry.export.provider import ReplicaIdentity

_GC_THRESHOLD = 20_000


@dataclass(frozen=True, slots=True)
class Placement:
    """What Ray gave this replica."""

    identity: ReplicaIdentity
    app_name: str
    cpus: float
    gpus: tuple[str, ...]
    """Its GPUs as CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""


def placement() -> Placement:
    """Ask Ray, and set up garbage collection for serving. Only inside a replica.

    Raises ConfigError where the deployment is scaled by our policy and its settings are wrong.
    """
    # A request allocates some hundred objects and leaves no cycles: looking for them every 700 costs 5 % of a replica.
    gc.set_threshold(_GC_THRESHOLD)
    serve_context = serve.get_replica_context()
    check_policy(serve_context)
    ray_context = ray.get_runtime_context()
    return Placement(
        identity=ReplicaIdentity(
            serve_context.replica_id.to_full_id_str(), ray_context.get_node_id(), dict(_scheduling(serve_context))
        ),
        app_name=serve_context.app_name,
        cpus=float(ray_context.get_assigned_resources().get("CPU", 1.0)),  # type: ignore[no-untyped-call]
        gpus=tuple(str(device) for device in ray_context.get_accelerator_ids().get("GPU", ())),
    )


def check_policy(context: ReplicaContext) -> None:
    """Raises ConfigError, naming the key: Serve's controller only gets the policy, and cannot refuse it."""
    config: Any = getattr(context, "_deployment_config", None)
    policy = getattr(getattr(config, "autoscaling_config", None), "policy", None)
    if policy is not None and policy.policy_function == POLICY:
        try:
            Settings.parse(policy.policy_kwargs)
        except ValueError as error:
            raise ConfigError(f"deployments.{context.deployment}.{error}") from None


def _scheduling(context: ReplicaContext) -> Iterator[tuple[str, float]]:
    """What Serve schedules this deployment by. Serve has no public way to ask; nothing, where it has moved."""
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

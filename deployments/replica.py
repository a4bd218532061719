"""Who and where this replica is, asked of Ray once, at start."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import ray
from ray import serve

from deployments.telemetry.provider import ReplicaIdentity

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
    """Ask Ray, and set up garbage collection for serving. Only inside a replica."""
    # A request allocates some hundred objects and leaves no cycles: looking for them every 700 costs 5 % of a replica.
    gc.set_threshold(_GC_THRESHOLD)
    serve_context = serve.get_replica_context()
    ray_context = ray.get_runtime_context()
    return Placement(
        identity=ReplicaIdentity(serve_context.replica_id.to_full_id_str(), ray_context.get_node_id()),
        app_name=serve_context.app_name,
        cpus=float(ray_context.get_assigned_resources().get("CPU", 1.0)),  # type: ignore[no-untyped-call]
        gpus=tuple(str(device) for device in ray_context.get_accelerator_ids().get("GPU", ())),
    )

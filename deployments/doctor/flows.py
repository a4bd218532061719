"""The connections that slowlens needs, and whether NetworkPolicies let them through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.doctor.policies import Peer, Policies
from deployments.doctor.problems import Problem
from deployments.doctor.snapshot import Object, Snapshot

_NAME = "app.kubernetes.io/name"
_TRANSPORT = 21000
"""The first of ``transport.ports``: what replicas send each other."""


@dataclass(frozen=True, slots=True)
class Flow:
    source: Peer
    target: Peer
    port: int
    what: str
    protocol: str = "TCP"


def blocked(snapshot: Snapshot) -> Iterator[Problem]:
    if not snapshot.may_read("networkpolicies"):
        return
    policies = Policies(
        snapshot.of("networkpolicies"),
        {one["metadata"]["name"]: one["metadata"].get("labels", {}) for one in snapshot.of("namespaces")},
    )
    for flow in needed(snapshot):
        names = policies.blocking(flow.source, flow.target, flow.port, flow.protocol)
        if names:
            yield Problem(
                "policy_blocks",
                "broken",
                f"a NetworkPolicy keeps {flow.source.name} from {flow.target.name}, port {flow.port}: {flow.what}",
                (f"none of these allows it: {', '.join(sorted(names))}",),
                "allow it in one of them, or take away the one that is not from k8s/base/network.yaml; policies add up",
            )


def needed(snapshot: Snapshot) -> Iterator[Flow]:
    """One connection of each kind; pods of one kind have the same labels."""
    head, worker = (_of(snapshot, "ray.io/node-type", role) for role in ("head", "worker"))
    collector, jaeger, prometheus, valkey = (
        _of(snapshot, _NAME, f"slowlens-{name}") for name in ("collector", "jaeger", "prometheus", "valkey")
    )
    operator = next((Peer.of(one) for one in snapshot.of("operators")), None)
    if head and worker:
        yield Flow(worker, head, 6379, "workers find the head by it")
        yield Flow(head, worker, _TRANSPORT, "the head starts replicas there")
        yield Flow(worker, worker, _TRANSPORT, "messages of requests from stage to stage")
    if operator and head:
        yield Flow(operator, head, 8265, "KubeRay gives Serve its configuration by it, and asks how it is")
    if head and valkey:
        yield Flow(head, valkey, 6379, "what the control plane remembers")
    if worker and collector:
        yield Flow(worker, collector, 4317, "traces and metrics")
    if collector and jaeger:
        yield Flow(collector, jaeger, 4317, "kept traces")
    if prometheus and collector:
        yield Flow(prometheus, collector, 8889, "metrics")
    if worker:
        for dns in snapshot.of("dns")[:1]:
            yield Flow(worker, Peer.of(dns), 53, "names of services", "UDP")
    if head:
        for slice_ in snapshot.of("api servers")[:1]:
            address = next((a for one in slice_.get("endpoints") or [] for a in one["addresses"]), None)
            port = next((one["port"] for one in slice_.get("ports") or []), 443)
            yield Flow(head, Peer("the API server", None, address=address), port, "the autoscaler adds workers by it")


def _of(snapshot: Snapshot, label: str, value: str) -> Peer | None:
    def is_it(pod: Object) -> bool:
        return bool(pod["metadata"].get("labels", {}).get(label) == value)

    return next((Peer.of(pod) for pod in snapshot.of("pods") if is_it(pod)), None)

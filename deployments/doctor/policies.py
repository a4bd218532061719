"""Whether NetworkPolicies let one pod reach another, by the rules of ``networking.k8s.io/v1``.

Policies add up: a pod that none selects for a direction may do all in it; one that some select may do what any of them
allows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.doctor.snapshot import Object


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection: a pod, or an address outside of the cluster's pods."""

    name: str
    namespace: str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    ports: Mapping[str, int] = field(default_factory=dict)
    """By name, as its containers declare them."""

    @classmethod
    def of(cls, pod: Object) -> Peer:
        containers = pod["spec"]["containers"]
        named = {one["name"]: one["containerPort"] for c in containers for one in c.get("ports", []) if "name" in one}
        metadata = pod["metadata"]
        address = pod.get("status", {}).get("podIP")
        return cls(metadata["name"], metadata["namespace"], metadata.get("labels", {}), address, named)


@dataclass(frozen=True, slots=True)
class Policies:
    """All policies that are known, and the labels of the namespaces."""

    all: Sequence[Object]
    namespaces: Mapping[str, Mapping[str, str]]

    def blocking(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> list[str]:
        """Names of the policies because of which ``source`` does not reach ``target``; empty if it does."""
        for direction, own, other, rules, peers in (
            ("Egress", source, target, "egress", "to"),
            ("Ingress", target, source, "ingress", "from"),
        ):
            selecting = [one for one in self.all if self._selects(one, own, direction)]
            allowed = any(
                self._allows(rule, peers, one["metadata"]["namespace"], other, target, port, protocol)
                for one in selecting
                for rule in one["spec"].get(rules) or []
            )
            if selecting and not allowed:
                return [one["metadata"]["name"] for one in selecting]
        return []

    def _selects(self, policy: Object, pod: Peer, direction: str) -> bool:
        spec = policy["spec"]
        types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
        is_there = policy["metadata"]["namespace"] == pod.namespace
        return is_there and direction in types and matches(spec.get("podSelector") or {}, pod.labels)

    def _allows(
        self, rule: Object, key: str, namespace: str, other: Peer, target: Peer, port: int, protocol: str
    ) -> bool:
        ports = rule.get("ports") or []
        if ports and not any(_has_port(one, target, port, protocol) for one in ports):
            return False
        peers = rule.get(key) or []
        return not peers or any(self._is_peer(one, namespace, other) for one in peers)

    def _is_peer(self, peer: Object, namespace: str, other: Peer) -> bool:
        if "ipBlock" in peer:
            return _in_block(peer["ipBlock"], other.address)
        if other.namespace is None:
            return False
        if "namespaceSelector" in peer:
            is_there = matches(peer["namespaceSelector"] or {}, self.namespaces.get(other.namespace, {}))
        else:
            is_there = other.namespace == namespace
        return is_there and matches(peer.get("podSelector") or {}, other.labels)


def _has_port(rule: Object, target: Peer, port: int, protocol: str) -> bool:
    if rule.get("protocol", "TCP") != protocol:
        return False
    wanted = rule.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return target.ports.get(wanted) == port
    return int(wanted) <= port <= int(rule.get("endPort", wanted))


def _in_block(block: Object, address: str | None) -> bool:
    if address is None:
        return False
    own = ipaddress.ip_address(address)
    inside = [block["cidr"], *block.get("except", [])]
    is_in, *excepted = (own in ipaddress.ip_network(one, strict=False) for one in inside)
    return is_in and not any(excepted)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether labels are selected; an empty selector selects all (``LabelSelector`` of Kubernetes)."""
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    return all(_holds(one, labels) for one in selector.get("matchExpressions") or [])


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None

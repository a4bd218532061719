"""NetworkPolicies as Kubernetes defines them, and whether ours let through what slowlens needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.doctor.policies import Peer, Policies, matches

K8S = Path(__file__).parents[3] / "k8s"
LABELS = {"a": {"team": "one"}, "b": {"team": "two"}}
CLIENT = Peer("client", "a", {"app": "client"}, "10.0.0.5")
SERVER = Peer("server", "b", {"app": "server"}, "10.0.0.6", {"web": 8080})


def policy(namespace: str, name: str = "p", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"podSelector": {}, **spec}}


def reaches(*policies: dict[str, Any], port: int = 8080, protocol: str = "TCP") -> bool:
    return not Policies(policies, LABELS).blocking(CLIENT, SERVER, port, protocol)


def test_without_a_policy_everything_is_allowed() -> None:
    assert reaches()


def test_a_policy_of_another_namespace_or_of_other_pods_says_nothing() -> None:
    assert reaches(policy("c", policyTypes=["Ingress", "Egress"]))
    assert reaches(policy("b", podSelector={"matchLabels": {"app": "other"}}, policyTypes=["Ingress"]))


def test_a_policy_without_rules_allows_nothing_and_types_default_to_ingress() -> None:
    assert not reaches(policy("b"))
    assert reaches(policy("a"))
    assert not reaches(policy("a", egress=[]))
    assert not reaches(policy("a", policyTypes=["Egress"]))


@pytest.mark.parametrize(
    ("rule", "is_allowed"),
    [
        ({}, True),
        ({"from": [{"podSelector": {}}]}, False),  # its own namespace alone
        ({"from": [{"namespaceSelector": {}}]}, True),
        ({"from": [{"namespaceSelector": {"matchLabels": {"team": "one"}}}]}, True),
        ({"from": [{"namespaceSelector": {"matchLabels": {"team": "two"}}}]}, False),
        ({"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "client"}}}]}, True),
        ({"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "x"}}}]}, False),
        ({"from": [{"podSelector": {}}, {"namespaceSelector": {}}]}, True),  # either
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}, True),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/24"]}}]}, False),
        ({"ports": [{"port": 8080}]}, True),
        ({"ports": [{"port": "web"}]}, True),
        ({"ports": [{"port": "other"}]}, False),
        ({"ports": [{"port": 8000, "endPort": 9000}]}, True),
        ({"ports": [{"port": 8000, "endPort": 8079}]}, False),
        ({"ports": [{"port": 8080, "protocol": "UDP"}]}, False),
        ({"ports": [{}]}, True),
    ],
)
def test_rules_of_one_direction(rule: dict[str, Any], is_allowed: bool) -> None:
    assert reaches(policy("b", ingress=[rule])) is is_allowed


def test_policies_add_up_and_both_directions_must_allow() -> None:
    closed = policy("b", "closed", policyTypes=["Ingress"])
    opened = policy("b", "open", ingress=[{}])

    assert reaches(closed, opened)
    assert not reaches(closed, opened, policy("a", egress=[{"ports": [{"port": 443}]}]))
    assert Policies([closed], LABELS).blocking(CLIENT, SERVER, 8080) == ["closed"]


def test_label_selectors() -> None:
    labels = {"tier": "web"}

    assert matches({}, labels)
    assert matches({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["web", "db"]}]}, labels)
    assert not matches({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["web"]}]}, labels)
    assert matches({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["web"]}]}, labels)
    assert matches({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}, labels)
    assert matches({"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}, labels)


# --- ours: who reaches what -------------------------------------------------------------------------------------------

OURS = {"slowlens": {"kubernetes.io/metadata.name": "slowlens"}, "may": {"slowlens/may-call": "true"}, "other": {}}
NODE = {"ray.io/is-ray-node": "yes"}
PODS = {
    "head": Peer("head", "slowlens", NODE | {"ray.io/node-type": "head"}),
    "worker": Peer("worker", "slowlens", NODE | {"ray.io/node-type": "worker"}),
    "cleanup": Peer("cleanup", "slowlens", NODE | {"ray.io/node-type": "redis-cleanup"}),
    "collector": Peer("collector", "slowlens", {"app.kubernetes.io/name": "slowlens-collector"}),
    "jaeger": Peer("jaeger", "slowlens", {"app.kubernetes.io/name": "slowlens-jaeger"}),
    "prometheus": Peer("prometheus", "slowlens", {"app.kubernetes.io/name": "slowlens-prometheus"}),
    "valkey": Peer("valkey", "slowlens", {"app.kubernetes.io/name": "slowlens-valkey"}),
    "operator": Peer("operator", "other", {"app.kubernetes.io/component": "kuberay-operator"}),
    "caller": Peer("caller", "may", {}),
    "neighbour": Peer("neighbour", "slowlens", {}),
    "stranger": Peer("stranger", "other", {}),
    "api": Peer("the API server", None, address="10.1.0.1"),
}
RAY = {"head", "worker", "cleanup"}
INSIDE = {"neighbour", "collector", "jaeger", "prometheus", "valkey"}
# Every port that a pod of ours listens on, and who is to reach it; the rest is refused.
ALLOWED: dict[tuple[str, int], set[str]] = {
    ("worker", 8000): RAY | INSIDE | {"operator", "caller"},
    ("worker", 9000): RAY | INSIDE | {"caller"},
    ("worker", 21000): RAY,
    ("worker", 8404): RAY,
    ("worker", 8265): RAY | {"operator"},
    ("head", 6379): RAY,
    ("head", 8265): RAY | {"operator"},
    ("head", 10001): RAY,
    ("collector", 4317): RAY,
    ("collector", 8889): {"prometheus"},
    ("jaeger", 4317): {"collector"},
    ("jaeger", 16686): RAY | INSIDE,
    ("prometheus", 9090): INSIDE,
    ("valkey", 6379): {"head", "cleanup"},
    # Of our pods the head alone calls the API server; the telemetry's are not kept from it, and have no rights there.
    ("api", 443): INSIDE | {"head", "operator", "caller", "stranger"},
    ("api", 6443): INSIDE | {"head", "operator", "caller", "stranger"},
}


def shipped() -> list[dict[str, Any]]:
    """Ours, as the overlays of two workers have them."""
    policies = [one for one in yaml.safe_load_all((K8S / "base" / "network.yaml").read_text()) if one]
    policies.append(yaml.safe_load((K8S / "components" / "valkey" / "network.yaml").read_text()))
    component = yaml.safe_load((K8S / "components" / "valkey" / "kustomization.yaml").read_text())
    (patch,) = (one["patch"] for one in component["patches"] if one["target"]["kind"] == "NetworkPolicy")
    (ray,) = (one for one in policies if one["metadata"]["name"] == "slowlens-ray")
    (addition,) = yaml.safe_load(patch)
    ray["spec"]["egress"].append(addition["value"])
    for one in policies:
        one["metadata"]["namespace"] = "slowlens"
    return policies


@pytest.mark.parametrize(("target", "port"), ALLOWED, ids=lambda one: str(one))
def test_who_reaches_what(target: str, port: int) -> None:
    policies = Policies(shipped(), OURS)
    sources = {name: pod for name, pod in PODS.items() if name != "api"}
    reaching = {name for name, pod in sources.items() if not policies.blocking(pod, PODS[target], port)}

    assert reaching == ALLOWED[target, port]

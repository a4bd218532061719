"""``slowlens doctor`` on a real cluster: well, and with one thing wrong at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from tests.cluster.running import NAMESPACE, is_settled, kubectl, pods, wait_until

LOCKED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.fixture
def said(applied: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, dict[str, Any]]]:
    """What it says now, by kind."""
    wait_until("settled", is_settled, 400)

    def ask() -> dict[str, dict[str, Any]]:
        status = main(["doctor", "--format", "json"])
        found = json.loads(capsys.readouterr().out)["problems"]
        assert status == (1 if any(one["severity"] != "note" for one in found) else 0)
        return {one["kind"]: one for one in found}

    return ask


@contextmanager
def there(*objects: dict[str, Any]) -> Iterator[None]:
    for one in objects:
        kubectl("-n", NAMESPACE, "apply", "-f", "-", given=json.dumps(one))
    try:
        yield
    finally:
        for one in objects:
            kubectl("-n", NAMESPACE, "delete", one["kind"], one["metadata"]["name"], "--force", "--grace-period=0")


def pod(name: str, image: str, cpu: str = "10m") -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "command": ["sleep", "600"],
        "securityContext": LOCKED,
        "resources": {"requests": {"cpu": cpu}},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [container]}}


def test_a_cluster_that_is_well(said: Callable[[], dict[str, dict[str, Any]]]) -> None:
    assert said() == {}


def test_a_pod_without_a_place_and_one_without_its_image(
    said: Callable[[], dict[str, dict[str, Any]]], image: str
) -> None:
    with there(pod("large", image, cpu="5000"), pod("absent", "slowlens.invalid/nothing:1")):
        wait_until("it cannot be pulled", lambda: "no_image" in said(), 60)
        found = said()

    assert set(found) == {"cannot_be_placed", "no_image"}
    assert found["cannot_be_placed"]["title"] == "no node has a place for large"
    assert "Insufficient cpu" in found["cannot_be_placed"]["evidence"][0]
    assert found["no_image"]["title"] == "the image slowlens.invalid/nothing:1 cannot be had: main of absent"


def test_a_policy_that_keeps_prometheus_from_the_collector(said: Callable[[], dict[str, dict[str, Any]]]) -> None:
    selector = {"matchLabels": {"app.kubernetes.io/name": "slowlens-prometheus"}}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "no-egress"},
        "spec": {"podSelector": selector, "policyTypes": ["Egress"]},
    }
    with there(policy):
        found = said()

    assert set(found) == {"policy_blocks"}
    assert "port 8889: metrics" in found["policy_blocks"]["title"]
    assert found["policy_blocks"]["evidence"] == ["none of these allows it: no-egress"]


def test_a_trace_store_that_is_away(said: Callable[[], dict[str, dict[str, Any]]]) -> None:
    kubectl("-n", NAMESPACE, "scale", "statefulset", "slowlens-jaeger", "--replicas=0")
    try:
        wait_until("Jaeger is gone", lambda: not pods("app.kubernetes.io/name=slowlens-jaeger"), 60)
        wait_until("its endpoint, too", lambda: "no_trace_store" in said(), 60)
    finally:
        kubectl("-n", NAMESPACE, "scale", "statefulset", "slowlens-jaeger", "--replicas=1")
    wait_until("all is well again", lambda: said() == {}, 120)

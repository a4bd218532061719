"""Who reaches what, tried from pods of the cluster, on every port. Needs a network plugin that enforces policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.doctor.policies import Peer, Policies
from tests.cluster.running import CALLERS, NAMESPACE, Load, found, is_settled, kubectl, pods, wait_until
from tests.unit.doctor.test_policies import ALLOWED

STRANGERS = "default"
LISTENING = {
    "worker": [8000, 9000, 8404],
    "head": [6379, 8265],
    "collector": [4317, 8889],
    "jaeger": [4317, 16686],
    "prometheus": [9090],
    "valkey": [6379],
}
CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def reached(target):
    try:
        socket.create_connection(tuple(target), 3).close()
        return True
    except OSError:
        return False

targets = json.load(sys.stdin)
with ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(reached, targets))))
"""


def pod_of(role: str) -> dict[str, Any]:
    label = f"ray.io/node-type={role}" if role in ("head", "worker") else f"app.kubernetes.io/name=slowlens-{role}"
    return pods(label)[0]


def sleeper(namespace: str, image: str) -> None:
    container = {"name": "main", "image": image, "command": ["sleep", "3600"], "imagePullPolicy": "IfNotPresent"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "stranger", "namespace": namespace},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
    }
    kubectl("apply", "-f", "-", given=json.dumps(pod))
    kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/stranger", "--timeout=60s")


@pytest.fixture
def sources(applied: Path, image: str) -> dict[str, tuple[str, str, str]]:
    """Namespace, pod and container of those who try."""
    wait_until("settled", is_settled, 300)
    load = Load("load", image)
    sleeper(STRANGERS, image)
    found_ = {role: (NAMESPACE, pod_of(role)["metadata"]["name"], f"ray-{role}") for role in ("head", "worker")}
    return {**found_, "caller": (CALLERS, load.name, "load"), "stranger": (STRANGERS, "stranger", "main")}


def test_who_reaches_what(sources: dict[str, tuple[str, str, str]]) -> None:
    targets = {role: pod_of(role) for role in LISTENING}
    asked = [(role, port) for role, ports in LISTENING.items() for port in ports]
    addresses = json.dumps([[targets[role]["status"]["podIP"], port] for role, port in asked])
    try:
        for source, (namespace, pod, container) in sources.items():
            command = ["-n", namespace, "exec", "-i", pod, "-c", container, "--", "python3", "-c", CONNECT]
            reached = json.loads(kubectl(*command, given=addresses))
            told = {one for one, is_reached in zip(asked, reached, strict=True) if is_reached}
            assert told == {one for one in asked if source in ALLOWED[one]}, source
    finally:
        kubectl("-n", STRANGERS, "delete", "pod", "stranger", "--force")
        kubectl("-n", CALLERS, "delete", "pod", "load", "--force")


def test_the_policies_of_the_cluster_are_read_as_they_act(sources: dict[str, tuple[str, str, str]]) -> None:
    """What ``slowlens doctor`` computes from them is what was seen to happen."""
    spaces = {one["metadata"]["name"]: one["metadata"].get("labels", {}) for one in found("namespaces")["items"]}
    policies = Policies(found("networkpolicies")["items"], spaces)
    for source, (namespace, pod, _) in sources.items():
        peer = Peer.of(found("pod", pod, namespace=namespace))
        for role, ports in LISTENING.items():
            for port in ports:
                is_let = not policies.blocking(peer, Peer.of(pod_of(role)), port)
                assert is_let is (source in ALLOWED[role, port]), (source, role, port)

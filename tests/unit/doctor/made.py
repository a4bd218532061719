"""A cluster on which everything is well, and what to change in it."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

from deployments.doctor.snapshot import Snapshot

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
NODE = {"ray.io/is-ray-node": "yes"}


def meta(name: str, namespace: str = "slowlens", **labels: str) -> dict[str, Any]:
    return {"name": name, "namespace": namespace, "labels": dict(labels)}


def pod(name: str, labels: dict[str, str], *, namespace: str = "slowlens", node: str = "node1") -> dict[str, Any]:
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-27T11:00:00Z"}
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels)},
        "spec": {
            "nodeName": node,
            "containers": [
                {
                    "name": "main",
                    "image": "slowlens:0.1.0",
                    "resources": {"requests": {"cpu": "3", "memory": "8Gi"}, "limits": {"memory": "8Gi"}},
                }
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.9",
            "conditions": [{"type": "PodScheduled", "status": "True"}, ready],
            "containerStatuses": [
                {
                    "name": "main",
                    "image": "slowlens:0.1.0",
                    "restartCount": 0,
                    "state": {"running": {}},
                    "lastState": {},
                }
            ],
        },
    }


def ray_pod(name: str, role: str, node: str = "node1") -> dict[str, Any]:
    return pod(name, NODE | {"ray.io/node-type": role, "ray.io/cluster": "slowlens-abc"}, node=node)


def named(name: str) -> dict[str, Any]:
    return pod(f"{name}-0", {"app.kubernetes.io/name": name})


def endpoints(service: str) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": service}
    return {
        "metadata": meta(f"{service}-1", **labels),
        "endpoints": [{"addresses": ["10.0.0.9"], "conditions": {"ready": True}}],
    }


def node(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}


def lease(name: str, renewed: str, noted: str) -> dict[str, Any]:
    managed = [{"manager": "kubelet", "time": noted}]
    return {"metadata": {"name": name, "managedFields": managed}, "spec": {"renewTime": renewed}}


def healthy() -> dict[str, list[dict[str, Any]]]:
    services = ("slowlens-serve-svc", "slowlens-collector", "slowlens-jaeger")
    application = {"status": "RUNNING", "message": "", "serveDeploymentStatuses": {"Model": {"status": "HEALTHY"}}}
    return copy.deepcopy(
        {
            "pods": [
                ray_pod("head", "head"),
                ray_pod("worker-1", "worker", "node1"),
                ray_pod("worker-2", "worker", "node2"),
                named("slowlens-collector"),
                named("slowlens-jaeger"),
                named("slowlens-prometheus"),
                named("slowlens-valkey"),
            ],
            "services": [{"metadata": meta(one)} for one in services],
            "endpointslices": [endpoints(one) for one in services],
            "events": [],
            "persistentvolumeclaims": [],
            "networkpolicies": [],
            "configmaps": [
                {"metadata": meta("slowlens-telemetry-1"), "data": {"TRACES_ENDPOINT": "slowlens-jaeger:4317"}}
            ],
            "rayservices": [
                {
                    "metadata": meta("slowlens"),
                    "status": {
                        "activeServiceStatus": {
                            "rayClusterName": "slowlens-abc",
                            "applicationStatuses": {"slowlens": application},
                        },
                        "conditions": [{"type": "Ready", "status": "True", "message": "endpoints"}],
                    },
                }
            ],
            "rayclusters": [{"metadata": meta("slowlens-abc"), "spec": {"gcsFaultToleranceOptions": {}}}],
            "nodes": [node("node1"), node("node2")],
            "namespaces": [
                {"metadata": {"name": "slowlens", "labels": {}}},
                {"metadata": {"name": "shop", "labels": {"slowlens/may-call": "true"}}},
                {"metadata": {"name": "kuberay", "labels": {}}},
            ],
            "storageclasses": [],
            "leases": [lease("node1", "2026-11-27T11:59:58.400000Z", "2026-11-27T11:59:58Z")],
            "operators": [pod("operator", {"app.kubernetes.io/component": "kuberay-operator"}, namespace="kuberay")],
            "dns": [],
            "api servers": [],
        }
    )


def snapshot(objects: dict[str, list[dict[str, Any]]], **other: Any) -> Snapshot:
    return Snapshot("slowlens", objects, version="v1.34.4", **other)

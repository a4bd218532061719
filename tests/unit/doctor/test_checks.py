"""What ``slowlens doctor`` says of made-up clusters. tests/cluster has real ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.doctor.checks import problems, summary
from deployments.doctor.problems import Problem
from deployments.doctor.report import as_json, as_text
from tests.unit.doctor.made import NOW, endpoints, healthy, lease, meta, pod, snapshot

Objects = dict[str, list[dict[str, Any]]]


def said(objects: Objects, **other: Any) -> list[Problem]:
    return problems(snapshot(objects, **other), NOW)


def only(objects: Objects, **other: Any) -> Problem:
    (found,) = said(objects, **other)
    return found


def named(objects: Objects, name: str) -> dict[str, Any]:
    (found,) = (one for one in objects["pods"] if one["metadata"]["name"] == name)
    return found


def test_of_a_healthy_cluster_nothing_is_said() -> None:
    assert said(healthy()) == []
    assert summary(snapshot(healthy())) == [
        "namespace slowlens, Kubernetes v1.34.4",
        "RayService slowlens answers: RayCluster slowlens-abc, 2 of 2 workers have replicas, on 2 nodes",
        "may call it: slowlens, shop",
    ]


def waiting(objects: Objects, name: str, reason: str, message: str = "") -> None:
    one = named(objects, name)
    one["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": reason, "message": message}}
    one["status"]["conditions"][1]["status"] = "False"


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"])
def test_an_image_that_cannot_be_had(reason: str) -> None:
    objects = healthy()
    waiting(objects, "head", reason, 'Back-off pulling image "slowlens:0.1.0"')
    found = only(objects)

    assert (found.kind, found.severity) == ("no_image", "broken")
    assert found.title == "the image slowlens:0.1.0 cannot be had: main of head"
    assert found.evidence == ('Back-off pulling image "slowlens:0.1.0"',)


def test_no_operator_at_all_and_one_that_does_not_run() -> None:
    unknown = frozenset({"rayservices", "rayclusters"})
    absent = said({**healthy(), "rayservices": [], "rayclusters": [], "operators": []}, unknown=unknown)
    stopped = only({**healthy(), "operators": []})

    assert [one.kind for one in absent] == ["no_operator"]
    assert "does not know RayServices" in absent[0].title
    assert stopped.kind == "no_operator"
    assert "nothing is changed or replaced" in stopped.title


def test_nothing_was_applied_here() -> None:
    objects = {**healthy(), "rayservices": [], "rayclusters": [], "pods": []}

    assert only(objects).kind == "nothing_there"


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("0/3 nodes are available: 3 Insufficient cpu.", "add a node"),
        ("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.", "see the claim"),
        ("0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: present}.", "add a toleration"),
    ],
)
def test_a_pod_without_a_place(message: str, fix: str) -> None:
    objects = healthy()
    one = named(objects, "worker-2")
    one["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}],
    }
    # The other worker answers alone meanwhile.
    found = {problem.kind: problem for problem in said(objects)}

    assert set(found) == {"cannot_be_placed", "only_one_worker"}
    assert found["cannot_be_placed"].evidence == (message, "it asks for cpu 3, memory 8Gi")
    assert found["cannot_be_placed"].fix.startswith(fix)


def test_a_secret_that_is_missing() -> None:
    objects = healthy()
    waiting(objects, "head", "CreateContainerConfigError", 'secret "slowlens-valkey" not found')

    assert only(objects).evidence == ('secret "slowlens-valkey" not found',)


def test_more_memory_than_the_limit() -> None:
    objects = healthy()
    status = named(objects, "worker-1")["status"]["containerStatuses"][0]
    status |= {
        "restartCount": 3,
        "lastState": {"terminated": {"reason": "OOMKilled", "finishedAt": "2026-11-27T11:58:00Z"}},
    }
    found = only(objects)

    assert (found.kind, found.severity) == ("out_of_memory", "degraded")
    assert "8Gi" in found.title


def test_a_container_that_ends_again_and_again() -> None:
    objects = healthy()
    waiting(objects, "slowlens-prometheus-0", "CrashLoopBackOff")
    named(objects, "slowlens-prometheus-0")["status"]["containerStatuses"][0]["lastState"] = {
        "terminated": {"exitCode": 128, "reason": "StartError", "message": "mount: not a directory"}
    }
    found = only(objects)

    assert found.kind == "crashes"
    assert found.evidence == ("exit code 128, StartError", "mount: not a directory")
    assert found.fix == "kubectl -n slowlens logs slowlens-prometheus-0 -c main --previous"


def test_an_idle_worker_is_not_ready_and_that_is_well_but_a_collector_is_not() -> None:
    objects = healthy()
    objects["pods"].append(pod("worker-3", {"ray.io/node-type": "worker"}))
    for name in ("worker-3", "slowlens-collector-0"):
        named(objects, name)["status"]["conditions"][1] |= {
            "status": "False",
            "lastTransitionTime": "2026-11-27T11:55:00Z",
        }

    assert [one.title for one in said(objects)] == ["slowlens-collector-0 runs, and has not been ready for 300 s"]


def test_a_new_cluster_whose_application_cannot_start_while_the_old_one_serves() -> None:
    objects = healthy()
    failed = {
        "status": "DEPLOY_FAILED",
        "message": "Failed to deploy",
        "serveDeploymentStatuses": {
            "Model": {"status": "UNHEALTHY", "message": "model.source: pkg:not_there: no package"}
        },
    }
    objects["rayservices"][0]["status"]["pendingServiceStatus"] = {
        "rayClusterName": "slowlens-def",
        "applicationStatuses": {"slowlens": failed},
    }
    found = only(objects)

    assert found.title == (
        "the application slowlens of the new cluster slowlens-def is DEPLOY_FAILED (the old cluster serves on)"
    )
    assert found.evidence == ("Failed to deploy", "Model is UNHEALTHY: model.source: pkg:not_there: no package")


def test_nobody_answers() -> None:
    objects = healthy()
    objects["endpointslices"] = [endpoints("slowlens-collector"), endpoints("slowlens-jaeger")]
    found = only(objects)

    assert found.kind == "nobody_answers"
    assert found.evidence == ("Ready is True: endpoints",)


def test_pods_that_were_refused() -> None:
    objects = healthy()
    event = {
        "metadata": meta("e"),
        "reason": "FailedCreate",
        "lastTimestamp": "2026-11-27T11:59:00Z",
        "involvedObject": {"kind": "StatefulSet", "name": "slowlens-jaeger"},
        "message": "pods is forbidden: exceeded quota: small",
    }
    objects["events"] = [event, event | {"lastTimestamp": "2026-11-27T09:00:00Z", "message": "long ago"}]

    assert only(objects).evidence == ("pods is forbidden: exceeded quota: small",)


def test_a_claim_without_a_volume() -> None:
    objects = healthy()
    spec = {"resources": {"requests": {"storage": "20Gi"}}}
    objects["persistentvolumeclaims"] = [
        {"metadata": meta("data-slowlens-jaeger-0"), "spec": spec, "status": {"phase": "Pending"}}
    ]

    assert only(objects).evidence == ("20Gi, default storage class: there is none",)


def test_a_trace_store_that_is_not_there() -> None:
    missing, dead, elsewhere = healthy(), healthy(), healthy()
    missing["configmaps"][0]["data"]["TRACES_ENDPOINT"] = "tempo:4317"
    dead["endpointslices"] = [endpoints("slowlens-serve-svc"), endpoints("slowlens-collector")]
    elsewhere["configmaps"][0]["data"]["TRACES_ENDPOINT"] = "tempo.monitoring:4317"

    assert only(missing).title == "there is no service tempo: no trace is kept"
    assert only(dead).title == "no pod of the service slowlens-jaeger is ready: no trace is kept meanwhile"
    assert said(elsewhere) == []


@pytest.mark.parametrize(
    ("renewed", "noted", "title"),
    [
        (
            "2026-11-27T12:00:04.500000Z",
            "2026-11-27T12:00:00Z",
            "the clock of node node2 is 4.5 s ahead of the API server's",
        ),
        (
            "2026-11-27T11:59:30.000000Z",
            "2026-11-27T12:00:00Z",
            "the clock of node node2 is 30.0 s behind the API server's",
        ),
    ],
)
def test_clocks_apart(renewed: str, noted: str, title: str) -> None:
    objects = healthy()
    objects["leases"].append(lease("node2", renewed, noted))

    assert only(objects).title == title


def test_a_policy_that_blocks() -> None:
    objects = healthy()
    objects["networkpolicies"] = [
        {"metadata": meta("deny-all"), "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
    ]
    found = said(objects)

    assert {one.kind for one in found} == {"policy_blocks"}
    assert {one.evidence for one in found} == {("none of these allows it: deny-all",)}
    assert any(
        one.title.startswith("a NetworkPolicy keeps worker-1 from slowlens-collector-0, port 4317") for one in found
    )
    assert any(one.title.startswith("a NetworkPolicy keeps operator from head, port 8265") for one in found)


def test_workers_on_one_node_and_a_control_plane_that_forgets() -> None:
    objects = healthy()
    named(objects, "worker-2")["spec"]["nodeName"] = "node1"
    objects["rayclusters"][0]["spec"] = {}
    together = {one.kind for one in said(objects)}
    one_node = {one.kind for one in said({**objects, "nodes": objects["nodes"][:1]})}

    assert together == {"workers_on_one_node", "control_plane_forgets"}
    assert one_node == {"control_plane_forgets"}


def test_what_may_not_be_read_is_said_and_not_taken_for_missing() -> None:
    objects = {**healthy(), "operators": [], "leases": []}
    refused = {"operators": 'pods is forbidden: User "dev" cannot list', "leases": "forbidden"}
    found = said(objects, refused=refused)

    assert [(one.kind, one.severity) for one in found] == [("not_looked_at", "note")] * 2


def test_the_worst_comes_first_on_the_page_and_in_json() -> None:
    objects = healthy()
    objects["rayclusters"][0]["spec"] = {}
    waiting(objects, "slowlens-jaeger-0", "ErrImagePull", "not found")
    found = said(objects)
    text, data = as_text(["one"], found), json.loads(as_json(["one"], found))

    assert [one["kind"] for one in data["problems"]] == ["no_image", "control_plane_forgets"]
    assert data["summary"] == ["one"]
    assert text.startswith("one\n\nbroken    the image slowlens:0.1.0 cannot be had: main of slowlens-jaeger-0\n")
    assert "          -> push it to a registry" in text
    assert "nothing is wrong" in as_text(["one"], [])

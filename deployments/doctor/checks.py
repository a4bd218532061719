"""What is wrong with the pods, their volumes, the RayService and the trace store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from deployments.doctor.flows import blocked
from deployments.doctor.problems import ORDER, Problem
from deployments.doctor.snapshot import Object, Snapshot

_NO_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_NOT_READY_S = 120
_SKEW_S = 2.0
"""Of spans on one axis; the API server notes whole seconds."""
_MESSAGE = 400


def problems(snapshot: Snapshot, now: datetime) -> list[Problem]:
    """What is wrong, the worst first; the same thing about several pods is one problem each."""
    found = [problem for check in CHECKS for problem in check(snapshot, now)]
    unique = {(one.kind, one.title): one for one in found}
    return sorted(unique.values(), key=lambda one: ORDER.index(one.severity))


def operator(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    install = "https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/kuberay-operator-installation.html"
    if "rayservices" in snapshot.unknown:
        yield Problem(
            "no_operator",
            "broken",
            "the KubeRay operator is not installed: the API server does not know RayServices",
            (),
            f"install it, then apply again: {install}",
        )
    elif snapshot.may_read("operators") and not any(map(_is_ready, snapshot.of("operators"))):
        pods = [f"{_name(one)}: {one['status'].get('phase')}" for one in snapshot.of("operators")]
        yield Problem(
            "no_operator",
            "broken",
            "no pod of the KubeRay operator is ready: what runs goes on, and nothing is changed or replaced",
            tuple(pods) or ("there is no pod with its labels in any namespace",),
            f"kubectl logs of it says why; to install it: {install}",
        )


def ray_service(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    if "rayservices" in snapshot.unknown:
        return
    if not snapshot.of("rayservices"):
        if snapshot.may_read("rayservices"):
            yield Problem(
                "nothing_there",
                "broken",
                f"there is no RayService in the namespace {snapshot.namespace}",
                (),
                "kubectl apply --server-side -k k8s/overlays/cpu, or name another namespace with --namespace",
            )
        return
    for service in snapshot.of("rayservices"):
        status = service.get("status", {})
        active = status.get("activeServiceStatus") or {}
        pending = status.get("pendingServiceStatus") or {}
        serves = _is_reached(snapshot, _name(service))
        for which, one in (("the running cluster", active), ("the new cluster", pending)):
            for name, application in (one.get("applicationStatuses") or {}).items():
                yield from _application(which, one.get("rayClusterName", ""), name, application, serves)
        if not serves:
            yield Problem(
                "nobody_answers",
                "broken",
                f"no pod answers requests of the service {_name(service)}-serve-svc",
                tuple(
                    f"{one['type']} is {one['status']}: {one.get('message', '')}".rstrip(": ")
                    for one in status.get("conditions", [])
                ),
                "see the other problems; without any, a worker needs about a minute from its start",
            )


def _application(which: str, cluster: str, name: str, status: Object, serves: bool) -> Iterator[Problem]:
    if status.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return
    told = [str(status.get("message", ""))]
    for deployment, one in (status.get("serveDeploymentStatuses") or {}).items():
        if one.get("status") not in ("HEALTHY", None):
            told.append(f"{deployment} is {one['status']}: {one.get('message', '')}")
    goes_on = " (the old cluster serves on)" if which == "the new cluster" and serves else ""
    yield Problem(
        "application_failed",
        "broken",
        f"the application {name} of {which} {cluster} is {status['status']}{goes_on}",
        tuple(_short(one) for one in told if one),
        "mend serveConfigV2 (its args) or the image, and apply again; a message about scheduling means that no worker "
        "has room",
    )


def pods(snapshot: Snapshot, now: datetime) -> Iterator[Problem]:
    for pod in snapshot.of("pods"):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                yield _unplaced(pod, condition.get("message", ""))
        for status in _containers(pod):
            yield from _container(pod, status)
        yield from _not_ready(pod, now)


def _unplaced(pod: Object, message: str) -> Problem:
    fixes = {
        "Insufficient": "add a node, or lower the requests of the pods (k8s/base), or take overlays/small",
        "PersistentVolumeClaim": "see the claim below; a cluster without a default storage class needs one, or volumes",
        "taint": "add a toleration for the taint to the pod's template, or use other nodes",
        "affinity": "no node has the labels that the pod asks for",
    }
    fix = next((fix for word, fix in fixes.items() if word in message), "see the scheduler's message")
    wants = {
        name: amount
        for one in pod["spec"]["containers"]
        for name, amount in (one.get("resources", {}).get("requests") or {}).items()
    }
    asks = ", ".join(f"{name} {amount}" for name, amount in sorted(wants.items()))
    return Problem(
        "cannot_be_placed",
        "broken",
        f"no node has a place for {_name(pod)}",
        (_short(message), f"it asks for {asks}"),
        fix,
    )


def _container(pod: Object, status: Object) -> Iterator[Problem]:
    waiting = status.get("state", {}).get("waiting") or {}
    last = status.get("lastState", {}).get("terminated") or status.get("state", {}).get("terminated") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    where = f"{status['name']} of {_name(pod)}"
    if reason in _NO_IMAGE:
        yield Problem(
            "no_image",
            "broken",
            f"the image {status['image']} cannot be had: {where}",
            (_short(message or reason),),
            "push it to a registry that the nodes reach, name it with `kustomize edit set image`, and give the "
            "account an imagePullSecret if the registry wants one",
        )
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"):
        yield Problem(
            "cannot_start", "broken", f"{where} cannot be started: {reason}", (_short(message),), "make what it names"
        )
    elif last.get("reason") == "OOMKilled":
        limit = next(
            (
                one.get("resources", {}).get("limits", {}).get("memory", "none")
                for one in pod["spec"]["containers"]
                if one["name"] == status["name"]
            ),
            "none",
        )
        yield Problem(
            "out_of_memory",
            "broken" if waiting else "degraded",
            f"{where} was killed because it needed more memory than its limit, {limit}",
            (f"restarted {status.get('restartCount', 0)} times, last at {last.get('finishedAt', '?')}",),
            "raise requests and limits of its memory; docs/kubernetes.md says what was measured",
        )
    elif reason == "CrashLoopBackOff" or last.get("reason") == "StartError":
        yield Problem(
            "crashes",
            "broken",
            f"{where} ends again and again",
            tuple(
                _short(one)
                for one in (
                    f"exit code {last.get('exitCode', '?')}, {last.get('reason', '?')}",
                    last.get("message", ""),
                )
                if one
            ),
            f"kubectl -n {pod['metadata']['namespace']} logs {_name(pod)} -c {status['name']} --previous",
        )


def _not_ready(pod: Object, now: datetime) -> Iterator[Problem]:
    labels = pod["metadata"].get("labels", {})
    ready = next((one for one in pod["status"].get("conditions", []) if one["type"] == "Ready"), None)
    is_worker = labels.get("ray.io/node-type") == "worker"
    # An idle worker has no replica, so its proxy has nothing to answer with: that is how it should be.
    if is_worker or ready is None or ready["status"] == "True" or pod["status"].get("phase") != "Running":
        return
    for_s = (now - _time(ready["lastTransitionTime"])).total_seconds()
    if for_s > _NOT_READY_S and not any(one.get("state", {}).get("waiting") for one in _containers(pod)):
        yield Problem(
            "not_ready",
            "broken",
            f"{_name(pod)} runs, and has not been ready for {for_s:.0f} s",
            (_short(ready.get("message", "")),),
            f"kubectl -n {pod['metadata']['namespace']} describe pod {_name(pod)} shows what its probe answers",
        )


def refused_pods(snapshot: Snapshot, now: datetime) -> Iterator[Problem]:
    """Pods that were not even made: a quota, a Pod Security Standard, a webhook."""
    for event in snapshot.of("events"):
        if event.get("reason") not in ("FailedCreate", "FailedToCreateHeadPod", "FailedToCreateWorkerPod"):
            continue
        at = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
        if (now - _time(at)).total_seconds() > 3600:
            continue
        about = event["involvedObject"]
        yield Problem(
            "pods_refused",
            "broken",
            f"{about['kind']} {about['name']} cannot make its pods",
            (_short(event.get("message", "")),),
            "a quota, a Pod Security Standard or an admission webhook refuses them; its message says which",
        )


def volumes(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    default = [
        _name(one)
        for one in snapshot.of("storageclasses")
        if one["metadata"].get("annotations", {}).get("storageclass.kubernetes.io/is-default-class") == "true"
    ]
    for claim in snapshot.of("persistentvolumeclaims"):
        if claim["status"].get("phase") != "Pending":
            continue
        named = claim["spec"].get("storageClassName")
        why = f"storage class {named}" if named else f"default storage class: {', '.join(default) or 'there is none'}"
        yield Problem(
            "no_volume",
            "broken",
            f"the claim {_name(claim)} has no volume",
            (f"{claim['spec']['resources']['requests']['storage']}, {why}",),
            "make a storage class the default, or a PersistentVolume for the claim; without one for the trace store "
            "slowlens serves without traces, without Valkey's it does not start",
        )


def trace_store(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    """Whether the service that the Collector sends traces to has somebody who takes them."""
    endpoint = next(
        (
            one["data"]["TRACES_ENDPOINT"]
            for one in snapshot.of("configmaps")
            if "TRACES_ENDPOINT" in (one.get("data") or {})
        ),
        None,
    )
    targets = [("slowlens-collector", "traces and metrics of all replicas go to it")]
    if endpoint:
        host = endpoint.rpartition("//")[2].rpartition(":")[0]
        name, *rest = host.split(".")
        # Elsewhere than in this namespace the API server was not asked.
        if not rest or rest[0] == snapshot.namespace:
            targets.append((name, f"TRACES_ENDPOINT is {endpoint}"))
    if not snapshot.may_read("services") or not snapshot.of("rayservices"):
        return
    for name, what in targets:
        if not any(_name(one) == name for one in snapshot.of("services")):
            yield Problem(
                "no_trace_store",
                "broken",
                f"there is no service {name}: no trace is kept",
                (what,),
                "apply k8s/base/jaeger.yaml and collector.yaml, or set TRACES_ENDPOINT in k8s/base/kustomization.yaml",
            )
        elif not _has_ready_endpoint(snapshot, name):
            yield Problem(
                "no_trace_store",
                "broken",
                f"no pod of the service {name} is ready: no trace is kept meanwhile",
                (what,),
                f"kubectl -n {snapshot.namespace} get pods -l app.kubernetes.io/name={name}",
            )


def clocks(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    """A kubelet writes its own time into its lease, and the API server notes by its clock when it was told."""
    for lease in snapshot.of("leases"):
        renewed = lease["spec"].get("renewTime")
        noted = [one["time"] for one in lease["metadata"].get("managedFields", []) if one.get("manager") == "kubelet"]
        if not renewed or not noted:
            continue
        apart_s = (_time(renewed) - _time(max(noted))).total_seconds()
        # The noted time is cut to whole seconds.
        if not -_SKEW_S < apart_s < 1 + _SKEW_S:
            yield Problem(
                "clocks_apart",
                "degraded",
                f"the clock of node {_name(lease)} is {abs(apart_s):.1f} s {'ahead of' if apart_s > 0 else 'behind'} "
                "the API server's",
                ("spans of one request on several nodes are shown out of order; queue times stay right",),
                "run chrony or another NTP client on it",
            )


def redundancy(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    if not snapshot.of("rayservices"):
        return
    ready = [one for one in _workers(snapshot) if _is_ready(one)]
    nodes = {one["spec"].get("nodeName") for one in ready}
    usable = [one for one in snapshot.of("nodes") if _is_ready(one) and not one["spec"].get("unschedulable")]
    if len(ready) == 1:
        yield Problem(
            "only_one_worker",
            "degraded",
            "one worker answers: when it is lost, requests fail until it is replaced",
            (_name(ready[0]),),
            "minReplicas of the worker group and min_replicas of the stages should be 2 (overlays/cpu)",
        )
    elif len(nodes) == 1 and len(usable) > 1:
        yield Problem(
            "workers_on_one_node",
            "degraded",
            f"all {len(ready)} workers that answer are on one node, {next(iter(nodes))}, of {len(usable)}",
            (),
            "delete one of them: a new one is placed elsewhere if there is room",
        )
    for cluster in snapshot.of("rayclusters"):
        if "gcsFaultToleranceOptions" not in cluster["spec"] and "deletionTimestamp" not in cluster["metadata"]:
            yield Problem(
                "control_plane_forgets",
                "degraded",
                f"the head of {_name(cluster)} keeps what it knows in memory: when it is lost, everything starts anew",
                (),
                "take the component valkey (overlays/cpu has it)",
            )


def not_looked_at(snapshot: Snapshot, _: datetime) -> Iterator[Problem]:
    for kind, told in sorted(snapshot.refused.items()):
        yield Problem(
            "not_looked_at", "note", f"{kind} could not be read", (_short(told),), "ask for the right to list them"
        )


CHECKS: tuple[Callable[[Snapshot, datetime], Iterator[Problem]], ...] = (
    operator,
    ray_service,
    pods,
    refused_pods,
    volumes,
    trace_store,
    lambda snapshot, _: blocked(snapshot),
    clocks,
    redundancy,
    not_looked_at,
)


def summary(snapshot: Snapshot) -> list[str]:
    """What is there, in a few lines."""
    lines = [f"namespace {snapshot.namespace}, Kubernetes {snapshot.version or 'of an unknown version'}"]
    for service in snapshot.of("rayservices"):
        status = service.get("status", {})
        active = (status.get("activeServiceStatus") or {}).get("rayClusterName") or "none"
        pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName")
        ready = [one for one in _workers(snapshot) if _is_ready(one)]
        nodes = {one["spec"].get("nodeName") for one in ready}
        upgrade = f", {pending} is being prepared" if pending else ""
        answers = "answers" if _is_reached(snapshot, _name(service)) else "does not answer"
        lines.append(
            f"RayService {_name(service)} {answers}: RayCluster {active}, {len(ready)} of {len(_workers(snapshot))} "
            f"workers have replicas, on {len(nodes)} node{'s' * (len(nodes) != 1)}{upgrade}"
        )
    callers = [
        _name(one)
        for one in snapshot.of("namespaces")
        if one["metadata"].get("labels", {}).get("slowlens/may-call") == "true"
    ]
    if snapshot.of("rayservices"):
        lines.append(f"may call it: {', '.join([snapshot.namespace, *callers])}")
    return lines


def _workers(snapshot: Snapshot) -> list[Object]:
    pods = snapshot.of("pods")
    here = [one for one in pods if one["metadata"].get("labels", {}).get("ray.io/node-type") == "worker"]
    return [one for one in here if "deletionTimestamp" not in one["metadata"]]


def _is_reached(snapshot: Snapshot, service: str) -> bool:
    return _has_ready_endpoint(snapshot, f"{service}-serve-svc")


def _has_ready_endpoint(snapshot: Snapshot, service: str) -> bool:
    return any(
        endpoint.get("conditions", {}).get("ready") is not False
        for one in snapshot.of("endpointslices")
        if one["metadata"].get("labels", {}).get("kubernetes.io/service-name") == service
        for endpoint in one.get("endpoints") or []
    )


def _containers(pod: Object) -> list[Any]:
    status = pod["status"]
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _is_ready(one: Object) -> bool:
    conditions = one["status"].get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _name(one: Object) -> str:
    return str(one["metadata"]["name"])


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _MESSAGE else f"{one_line[:_MESSAGE]}..."


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)

"""What the API server says, read once with ``kubectl get``: nothing is changed, and no Secret is read.

kubectl brings the ways to log in that a cluster may want (exec plugins, tokens, certificates).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import ConfigError

Object = Mapping[str, Any]
"""A Kubernetes object as JSON."""

_IN_NAMESPACE = (
    "pods",
    "services",
    "endpointslices.discovery.k8s.io",
    "events",
    "persistentvolumeclaims",
    "networkpolicies.networking.k8s.io",
    "configmaps",
    "rayservices.ray.io",
    "rayclusters.ray.io",
)
_OF_THE_CLUSTER: Mapping[str, tuple[str, ...]] = {
    "nodes": ("nodes",),
    "namespaces": ("namespaces",),
    "storageclasses": ("storageclasses.storage.k8s.io",),
    "leases": ("leases.coordination.k8s.io", "-n", "kube-node-lease", "--show-managed-fields"),
    "operators": ("pods", "-A", "-l", "app.kubernetes.io/component=kuberay-operator"),
    "operators by name": ("pods", "-A", "-l", "app.kubernetes.io/name=kuberay-operator"),
    "dns": ("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns"),
    "api servers": ("endpointslices.discovery.k8s.io", "-n", "default", "-l", "kubernetes.io/service-name=kubernetes"),
}
_TIMEOUT_S = 20
_NO_SUCH_KIND = "the server doesn't have a resource type"


class NoAnswer(Exception):
    """The API server cannot be asked at all."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Objects by kind, those of one namespace and some of the cluster."""

    namespace: str
    objects: Mapping[str, Sequence[Object]]
    unknown: frozenset[str] = frozenset()
    """Kinds that the API server does not know."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kinds that this user may not read, with what the API server said."""
    version: str = ""

    def of(self, kind: str) -> Sequence[Object]:
        return self.objects.get(kind, ())

    def may_read(self, kind: str) -> bool:
        return kind not in self.refused


def read(namespace: str, context: str | None) -> Snapshot:
    """Raises ConfigError if there is no kubectl, and NoAnswer with what kubectl said."""
    if shutil.which("kubectl") is None:
        raise ConfigError("kubectl is not installed; it is needed to read from the API server")
    base = ["kubectl", *(["--context", context] if context else [])]

    def ask(arguments: Sequence[str]) -> tuple[Sequence[Object], str]:
        result = _run([*base, "get", *arguments, "-o", "json"])
        if result.returncode == 0:
            return json.loads(result.stdout)["items"], ""
        return (), result.stderr.strip()

    version = _run([*base, "version", "-o", "json"])
    if version.returncode:
        raise NoAnswer(version.stderr.strip() or "no answer")
    questions = {kind: (kind, "-n", namespace) for kind in _IN_NAMESPACE} | dict(_OF_THE_CLUSTER)
    with ThreadPoolExecutor(6) as pool:
        answers = dict(zip(questions, pool.map(ask, questions.values()), strict=True))
    objects = {kind.partition(".")[0]: items for kind, (items, _) in answers.items()}
    objects["operators"] = [*objects["operators"], *objects.pop("operators by name")]
    failed = {kind.partition(".")[0]: told for kind, (_, told) in answers.items() if told}
    unknown = frozenset(kind for kind, told in failed.items() if _NO_SUCH_KIND in told)
    return Snapshot(
        namespace,
        objects,
        unknown,
        {kind: told.splitlines()[-1] for kind, told in failed.items() if kind not in unknown},
        json.loads(version.stdout).get("serverVersion", {}).get("gitVersion", ""),
    )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    timeout = f"--request-timeout={_TIMEOUT_S}s"
    try:
        return subprocess.run([*command, timeout], capture_output=True, text=True, timeout=_TIMEOUT_S + 5)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {_TIMEOUT_S} s") from None

"""slowlens on the cluster that ``KUBECONFIG`` names, callers in pods of their own, and what they were told."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMESPACE, CALLERS = "slowlens", "slowlens-callers"
URL = f"http://slowlens-serve-svc.{NAMESPACE}:8000/v1/embeddings"
SILENT_S = 5
"""Longer than clients pause between two requests, and than an answer takes."""
WORKER, HEAD = "ray.io/node-type=worker", "ray.io/node-type=head"


def kubectl(*arguments: str, given: str | None = None, timeout_s: float = 120, check: bool = True) -> str:
    result = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=timeout_s)
    if check and result.returncode:
        raise AssertionError(f"kubectl {' '.join(arguments)}: {result.stderr.strip()[-2000:]}")
    return result.stdout


def found(*arguments: str, namespace: str = NAMESPACE) -> Any:
    return json.loads(kubectl("-n", namespace, "get", *arguments, "-o", "json"))


def pods(selector: str) -> list[dict[str, Any]]:
    """Those that are not being deleted, the ready ones first."""
    items = found("pods", "-l", selector)["items"]
    there = [one for one in items if "deletionTimestamp" not in one["metadata"]]
    return sorted(there, key=is_ready, reverse=True)


def is_ready(pod: dict[str, Any]) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


def wait_until(what: str, is_so: Callable[[], bool], limit_s: float = 300, every_s: float = 1) -> float:
    """Return how many seconds it took."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > limit_s:
            raise AssertionError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(every_s)
    return time.monotonic() - began


def ray_service() -> dict[str, Any]:
    return dict(found("rayservice", "slowlens"))


def active_cluster() -> str:
    return str(ray_service()["status"]["activeServiceStatus"]["rayClusterName"])


def is_serving(workers: int = 2, after: str = "") -> bool:
    """Whether the active cluster has a head and so many workers, all ready, and is not the one named ``after``."""
    status = ray_service().get("status", {})
    if status.get("pendingServiceStatus", {}).get("rayClusterName"):
        return False
    name = status.get("activeServiceStatus", {}).get("rayClusterName", "")
    if not name or name == after:
        return False
    ready = [one for one in pods(f"ray.io/cluster={name}") if is_ready(one)]
    heads = [one for one in ready if one["metadata"]["labels"]["ray.io/node-type"] == "head"]
    return len(heads) == 1 and len(ready) - len(heads) >= workers


def is_settled(workers: int = 2) -> bool:
    """Whether it serves and nothing that was replaced is still there. (The autoscaler may have added idle workers.)"""
    if not is_serving(workers):
        return False
    own = active_cluster()
    there = [one["metadata"] for one in found("pods", "-l", "ray.io/is-ray-node=yes")["items"]]
    return all(one["labels"]["ray.io/cluster"] == own and "deletionTimestamp" not in one for one in there)


def overlay(folder: Path, name: str, image: str) -> Path:
    """An overlay of ours with another image."""
    registry, _, tag = image.rpartition(":")
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "resources": [os.path.relpath(ROOT / "k8s" / "overlays" / name, folder)],
        "images": [{"name": "slowlens", "newName": registry, "newTag": tag}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


def apply(folder: Path) -> None:
    kubectl("apply", "--server-side", "--force-conflicts", "-k", str(folder))


@dataclass(frozen=True, slots=True)
class Row:
    """What callers saw while something was done."""

    what: str
    requests: int
    failed: Counter[str]
    """By outcome and what was told, those that were not answered with 200."""
    p99_ms: float
    longest_s: float
    failed_for_s: float

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {outcome}" for outcome, count in self.failed.most_common()) or "0"
        during = f" during {self.failed_for_s:.1f} s" if self.failed else ""
        return (
            f"{self.what}: {failed} of {self.requests} failed{during}; p99 {self.p99_ms:.0f} ms, "
            f"longest {self.longest_s:.2f} s"
        )


def row(what: str, lines: list[dict[str, Any]]) -> Row:
    """What lines of load.py say. A client that has said nothing for long waits for an answer, and that counts."""
    until = max(one["at"] + one["s"] for one in lines)
    heard = {one["client"]: one["at"] + one["s"] for one in lines}
    silent = {number: at for number, at in heard.items() if until - at > SILENT_S}
    lines = lines + [{"at": at, "s": until - at, "outcome": "no answer yet", "told": ""} for at in silent.values()]
    took = sorted(one["s"] for one in lines)
    bad = [one for one in lines if one["outcome"] != 200]
    during = max(one["at"] for one in bad) - min(one["at"] for one in bad) if bad else 0.0
    return Row(
        what,
        len(lines),
        Counter(f"{one['outcome']} {one['told'][:120]}".strip() for one in bad),
        took[min(len(took) - 1, int(0.99 * len(took)))] * 1e3,
        took[-1],
        during,
    )


class Load:
    """Clients in a pod of their own, in another namespace."""

    def __init__(self, name: str, image: str, clients: int = 8, rate: float = 20) -> None:
        self.name = name
        kubectl("-n", CALLERS, "delete", "pod", name, "--ignore-not-found", "--grace-period=0", "--force")
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": CALLERS},
            "spec": {
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "load",
                        "image": image,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python3", "/load/load.py", URL, str(clients), str(rate)],
                        "volumeMounts": [{"name": "load", "mountPath": "/load"}],
                    }
                ],
                "volumes": [{"name": "load", "configMap": {"name": "load"}}],
            },
        }
        kubectl("apply", "-f", "-", given=json.dumps(pod))
        wait_until("the first answers", lambda: len(self.lines()) > clients, 120)

    def lines(self) -> list[dict[str, Any]]:
        text = kubectl("-n", CALLERS, "logs", self.name, check=False)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def stop(self) -> list[dict[str, Any]]:
        lines = self.lines()
        kubectl("-n", CALLERS, "delete", "pod", self.name, "--grace-period=0", "--force")
        return lines


@contextmanager
def callers() -> Iterator[None]:
    """The callers' namespace, labelled so that the network policies let them in."""
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": CALLERS, "labels": {"slowlens/may-call": "true"}},
    }
    script = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "load", "namespace": CALLERS},
        "data": {"load.py": (HERE / "load.py").read_text()},
    }
    for one in (namespace, script):
        kubectl("apply", "-f", "-", given=json.dumps(one))
    try:
        yield
    finally:
        kubectl("delete", "namespace", CALLERS, "--wait=false")

"""Writes the manifests that are generated from the code and serve_config.yaml: ``python -m k8s.build``.

A test fails if the files differ from what this would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from k8s.alerts import rules
from k8s.dashboards import DASHBOARDS, dashboard

HERE = Path(__file__).parent
SERVE_CONFIG = HERE.parent / "serve_config.yaml"
SERVE_MODELS = HERE.parent / "serve_models.yaml"
NAME = "slowlens"
_MADE = "# Made by `python -m k8s.build`.\n"


class _Block(yaml.SafeDumper):
    """Writes multi-line texts as blocks, and mappings in full instead of as anchors and aliases."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Block.add_representer(str, _text)


def dumped(document: Any) -> str:
    return yaml.dump(document, Dumper=_Block, sort_keys=False, width=10_000)


def serve_config(
    source: Path = SERVE_CONFIG, *, replicas: int = 2, gpus_per_model_replica: float = 0
) -> dict[str, Any]:
    """Return a configuration of Serve with the settings that differ on a cluster.

    replicas: how many of each stage there are at least; two or more are on as many workers.
    """
    # Through JSON: YAML's aliases are one object in several places.
    config: dict[str, Any] = json.loads(json.dumps(yaml.safe_load(source.read_text())))
    # Listen on the pod's address; the NetworkPolicy decides who may connect.
    config["http_options"]["host"] = "0.0.0.0"
    # For the cluster's log collector.
    config["logging_config"]["encoding"] = "JSON"
    for application in config["applications"]:
        _of_a_cluster(application, replicas, gpus_per_model_replica)
    return config


def _of_a_cluster(application: dict[str, Any], replicas: int, gpus_per_model_replica: float) -> None:
    # The Collector decides which traces are kept. A gateway has the settings of each of its models.
    for args in application["args"].get("applications", {"": application["args"]}).values():
        args.setdefault("telemetry", {}).setdefault("sampling", {})["mode"] = "tail"
    for deployment in application["deployments"]:
        if "autoscaling_config" in deployment:
            deployment["autoscaling_config"]["min_replicas"] = replicas
        else:
            deployment["num_replicas"] = replicas
        if replicas > 1:
            deployment["max_replicas_per_node"] = 1
        if deployment["name"] == "Model" and gpus_per_model_replica:
            deployment["ray_actor_options"]["num_gpus"] = gpus_per_model_replica


def serve_patch(config: dict[str, Any]) -> str:
    resource = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {"serveConfigV2": dumped(config)},
    }
    return _MADE + dumped(resource)


def rules_of_operator() -> dict[str, Any]:
    """The same rules as an object of the Prometheus operator."""
    api = "monitoring.coreos.com/v1"
    return {"apiVersion": api, "kind": "PrometheusRule", "metadata": {"name": NAME}, "spec": rules()}


def files() -> dict[Path, str]:
    made = {
        HERE / "base" / "serve.yaml": serve_patch(serve_config()),
        HERE / "overlays" / "gpu" / "serve.yaml": serve_patch(serve_config(gpus_per_model_replica=1)),
        HERE / "overlays" / "small" / "serve.yaml": serve_patch(serve_config(replicas=1)),
        HERE / "components" / "models" / "serve.yaml": serve_patch(serve_config(SERVE_MODELS)),
        HERE / "base" / "prometheus" / "rules.yaml": _MADE + dumped(rules()),
        HERE / "components" / "prometheus-operator" / "rules.yaml": _MADE + dumped(rules_of_operator()),
    }
    for uid in DASHBOARDS:
        made[HERE / "base" / "grafana" / f"{uid}.json"] = json.dumps(dashboard(uid), indent=2) + "\n"
    return made


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

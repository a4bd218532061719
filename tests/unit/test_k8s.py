"""The manifests as built by kustomize: valid for Kubernetes and KubeRay, and consistent with the code."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import ray
import yaml
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from deployments import __version__
from deployments.cli.main import parser
from deployments.cli.serve import FAST
from deployments.config import AppConfig
from deployments.telemetry.export.prometheus_names import prometheus_name, series
from deployments.telemetry.metrics import METRICS
from k8s.alerts import ALERTS
from k8s.build import HERE, SERVE_CONFIG, files
from k8s.dashboards import DASHBOARDS, dashboard
from tests.unit.test_config import unknown_keys

OVERLAYS = ("cpu", "gpu", "small", "cpu with all components")
COMPONENTS = ("grafana", "collectors")
OURS = {"RayService", "Kustomization"}
CRD = "SLOWLENS_KUBERAY_CRD"
"""Environment variable with the path of the RayService CustomResourceDefinition from a KubeRay release."""
VERSION = __version__
RAY = re.findall(r"^ray==(.+)$", (HERE.parent / "constraints.txt").read_text(), re.MULTILINE)[0]


def built(overlay: str, folder: Path, components: Sequence[str] = COMPONENTS) -> list[dict[str, Any]]:
    """The resources of an overlay, or of one in ``folder`` that adds components."""
    name, _, with_components = overlay.partition(" with ")
    path = HERE / "overlays" / name
    if with_components:
        wanted = {
            "resources": [os.path.relpath(path, folder)],
            "components": [os.path.relpath(HERE / "components" / one, folder) for one in components],
            "namespace": "slowlens",
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
        path = folder
    command = ["kubectl", "kustomize", str(path)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def resources(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return built(overlay, tmp_path_factory.mktemp("overlay").resolve())


def service(resources: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (one for one in resources if one["kind"] == "RayService")
    return found


def pod_specs(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in resources:
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
        elif one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]["spec"]


# --- Kubernetes and KubeRay schemas ----------------------------------------------------------------------------------


def test_core_resources_are_valid_for_kubernetes(overlay: str, resources: list[dict[str, Any]]) -> None:
    core = [one for one in resources if one["kind"] not in OURS]

    always = {"ConfigMap", "Deployment", "Namespace", "NetworkPolicy", "PriorityClass", "Service", "ServiceAccount"}
    of_two = set() if overlay == "small" else {"PodDisruptionBudget", "Role", "RoleBinding"}
    assert {one["kind"] for one in core} == always | of_two | {"StatefulSet"}
    for one in core:
        kubernetes_validate.validate(one, "1.34", strict=True)


@pytest.mark.skipif(CRD not in os.environ, reason=f"{CRD} does not name KubeRay's definition of the RayService")
def test_the_rayservice_is_valid_for_kuberay(resources: list[dict[str, Any]]) -> None:
    validator().validate(service(resources))
    typo = json.loads(json.dumps(service(resources)))
    typo["spec"]["rayClusterConfig"]["rayVersoin"] = "2"
    with pytest.raises(jsonschema.ValidationError, match="rayVersoin"):
        validator().validate(typo)


@functools.cache
def validator() -> Any:
    definition = yaml.load(Path(os.environ[CRD]).read_text(), yaml.CSafeLoader)
    (schema,) = (one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1")
    strict(schema)
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> None:
    """Reject unknown fields, as ``kubectl apply --validate=strict`` does. Whole resources have a few extra fields."""
    if not isinstance(schema, dict):
        return
    is_closed = "properties" in schema and "apiVersion" not in schema["properties"]
    if is_closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for one in list(schema.values()):
        strict(one)


OTHERS = {"Gateway", "HTTPRoute", "PrometheusRule", "ServiceMonitor"}
"""Kinds of other projects. They were tried on an API server that knows them: docs/kubernetes.md."""


@pytest.mark.parametrize("component", sorted(path.name for path in (HERE / "components").iterdir()))
def test_every_component_can_be_added(component: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    # Valkey is in this overlay already.
    made = built("gpu with one", tmp_path.resolve(), [component] if component != "valkey" else [])

    for one in made:
        if one["kind"] not in OURS | OTHERS:
            kubernetes_validate.validate(one, "1.34", strict=True)
    if CRD in os.environ:
        validator().validate(service(made))
    ServeDeploySchema.model_validate(yaml.safe_load(service(made)["spec"]["serveConfigV2"]))


def test_everything_is_in_one_namespace(resources: list[dict[str, Any]]) -> None:
    of_the_cluster = ("Namespace", "PriorityClass")
    inside = [one for one in resources if one["kind"] not in of_the_cluster]
    assert {one["metadata"].get("namespace") for one in inside} == {"slowlens"}


# --- Serve configuration ---------------------------------------------------------------------------------------------


def test_the_serve_config_matches_the_repository(overlay: str, resources: list[dict[str, Any]]) -> None:
    config = yaml.safe_load(service(resources)["spec"]["serveConfigV2"])
    expected = json.loads(json.dumps(yaml.safe_load(SERVE_CONFIG.read_text())))
    # The only differences on a cluster.
    expected["http_options"]["host"] = "0.0.0.0"
    expected["logging_config"]["encoding"] = "JSON"
    expected["applications"][0]["args"]["telemetry"]["sampling"]["mode"] = "tail"
    for deployment in expected["applications"][0]["deployments"]:
        if overlay != "small":
            deployment["autoscaling_config"]["min_replicas"] = 2
            deployment["max_replicas_per_node"] = 1
    if overlay == "gpu":
        (model,) = (one for one in expected["applications"][0]["deployments"] if one["name"] == "Model")
        model["ray_actor_options"]["num_gpus"] = 1

    assert config == expected
    ServeDeploySchema.model_validate(config)
    assert list(unknown_keys(config, ServeDeploySchema, "")) == []
    AppConfig.parse(config["applications"][0]["args"])


def test_generated_files_are_up_to_date() -> None:
    for path, text in files().items():
        assert path.read_text() == text, f"{path}: run python -m k8s.build"


def test_every_ray_process_starts_with_the_fast_environment(resources: list[dict[str, Any]]) -> None:
    for name, spec in pod_specs([service(resources)]):
        (container,) = spec["containers"]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        fast = {key: one.value for key, one in FAST.items()}
        # A stopping ingress is known in more than one place.
        fast["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "10"
        assert {key: environment.get(key) for key in fast} == fast, name
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://slowlens-collector:4317"
        assert {"K8S_POD_NAME", "K8S_NODE_NAME", "K8S_NAMESPACE_NAME"} <= environment.keys()


def test_versions_match_the_package(resources: list[dict[str, Any]]) -> None:
    dockerfile = (HERE / "Dockerfile").read_text()

    assert ray.__version__ == RAY
    assert service(resources)["spec"]["rayClusterConfig"]["rayVersion"] == RAY
    assert f"ARG BASE=rayproject/ray:{RAY}-py311-cpu\nFROM ${{BASE}}\n" in dockerfile
    assert f"slowlens:{VERSION}" in dockerfile
    assert {spec["containers"][0]["image"] for _, spec in pod_specs([service(resources)])} == {f"slowlens:{VERSION}"}


# --- how it runs -----------------------------------------------------------------------------------------------------


def test_the_head_runs_no_work_and_receives_no_requests(overlay: str, resources: list[dict[str, Any]]) -> None:
    spec = service(resources)["spec"]

    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is (overlay != "small")
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}


def test_gpu_workers_scale_from_zero_and_only_the_model_requests_them(
    overlay: str, resources: list[dict[str, Any]]
) -> None:
    groups = {one["groupName"]: one for one in service(resources)["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    config = yaml.safe_load(service(resources)["spec"]["serveConfigV2"])
    asking = [
        one["name"] for one in config["applications"][0]["deployments"] if one["ray_actor_options"].get("num_gpus")
    ]

    if overlay != "gpu":
        assert (set(groups), asking) == ({"cpu"}, [])
        return
    assert (set(groups), asking) == ({"cpu", "gpu"}, ["Model"])
    assert (groups["gpu"]["minReplicas"], groups["gpu"]["replicas"]) == (0, 0)
    (container,) = groups["gpu"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert not any("nvidia.com/gpu" in json.dumps(groups["cpu"]) for _ in groups)


def test_there_are_two_of_everything_that_answers(overlay: str, resources: list[dict[str, Any]]) -> None:
    spec = service(resources)["spec"]["rayClusterConfig"]
    config = yaml.safe_load(service(resources)["spec"]["serveConfigV2"])
    deployments = config["applications"][0]["deployments"]
    (worker, *_) = spec["workerGroupSpecs"]
    pod = worker["template"]["spec"]
    count = 1 if overlay == "small" else 2

    assert (worker["minReplicas"], worker["replicas"]) == (count, count)
    assert {one["autoscaling_config"]["min_replicas"] for one in deployments} == {count}
    assert {one.get("max_replicas_per_node") for one in deployments} == {None if overlay == "small" else 1}
    assert [one["topologyKey"] for one in pod["topologySpreadConstraints"]] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    # One replica of each stage fits a worker.
    wanted = sum(one["ray_actor_options"]["num_cpus"] for one in deployments)
    assert wanted <= float(pod["containers"][0]["resources"]["requests"]["cpu"])


def test_the_control_plane_outlives_its_head(overlay: str, resources: list[dict[str, Any]]) -> None:
    spec = service(resources)["spec"]["rayClusterConfig"]
    there = {(one["kind"], one["metadata"]["name"]): one for one in resources}
    if overlay == "small":
        assert "gcsFaultToleranceOptions" not in spec
        assert not [name for _, name in there if "valkey" in name]
        return
    options = spec["gcsFaultToleranceOptions"]
    valkey = there["StatefulSet", "slowlens-valkey"]["spec"]
    (container,) = valkey["template"]["spec"]["containers"]
    (first,) = valkey["template"]["spec"]["initContainers"]
    (policy,) = there["NetworkPolicy", "slowlens-valkey"]["spec"]["ingress"]

    assert options["redisAddress"] == "redis://slowlens-valkey:6379"
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert [one["valueFrom"]["secretKeyRef"] for one in container["env"]] == [secret, secret]
    # Only what makes the Secret can call the API server, and it can do nothing else there.
    assert [one["name"] for one in first["volumeMounts"]] == ["config", "account"]
    assert [one["name"] for one in container["volumeMounts"]] == ["config", "data"]
    assert there["Role", "slowlens-valkey"]["rules"] == [
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}
    ]
    assert policy["from"][0]["podSelector"]["matchExpressions"][0]["values"] == ["head", "redis-cleanup"]
    assert valkey["volumeClaimTemplates"]


def test_the_priorities_exist(resources: list[dict[str, Any]]) -> None:
    there = {one["metadata"]["name"]: one["value"] for one in resources if one["kind"] == "PriorityClass"}
    used = {spec["priorityClassName"] for _, spec in pod_specs(resources) if "priorityClassName" in spec}

    assert used == set(there) == {"slowlens-control-plane", "slowlens-workers"}
    assert there["slowlens-control-plane"] > there["slowlens-workers"] > 0


def test_every_container_is_hardened_and_requests_resources(resources: list[dict[str, Any]]) -> None:
    for name, spec in pod_specs(resources):
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["runAsNonRoot"] is True, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name
    spec = service(resources)["spec"]["rayClusterConfig"]
    if spec["enableInTreeAutoscaling"]:
        assert spec["autoscalerOptions"]["securityContext"]["runAsNonRoot"]


def test_only_the_head_has_api_access(resources: list[dict[str, Any]]) -> None:
    for name, spec in pod_specs(resources):
        account = "slowlens-valkey" if name == "slowlens-valkey" else "slowlens"
        if name != "head":
            assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == (account, False), name
    assert {one["metadata"]["name"] for one in resources if one["kind"] == "Role"} <= {"slowlens-valkey"}


def test_ray_and_pipeline_pods_have_network_policies(resources: list[dict[str, Any]]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in resources if one["kind"] == "NetworkPolicy"}
    open_to_callers = [
        port["port"]
        for rule in policies["slowlens-ray"]["ingress"]
        for port in rule.get("ports", [])
        if "podSelector" in rule["from"][0] and not rule["from"][0]["podSelector"]
    ]

    assert open_to_callers == [8000, 9000]
    for deployment in (one for one in resources if one["kind"] in ("Deployment", "StatefulSet")):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selectors = [policy["podSelector"]["matchLabels"] for policy in policies.values()]
        assert any(selector.items() <= labels.items() for selector in selectors), labels


def test_referenced_services_and_config_maps_exist(resources: list[dict[str, Any]]) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in resources}
    for _, spec in pod_specs(resources):
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
    prometheus = yaml.safe_load((HERE / "base" / "prometheus" / "prometheus.yaml").read_text())
    targets = [target for job in prometheus["scrape_configs"] for target in job["static_configs"][0]["targets"]]
    assert {("Service", target.partition(":")[0]) for target in targets} <= there


def test_every_ray_node_is_drained_before_it_stops(resources: list[dict[str, Any]]) -> None:
    config = yaml.safe_load(service(resources)["spec"]["serveConfigV2"])
    for name, spec in pod_specs([service(resources)]):
        (*_, script) = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        drain, stop = (part.strip() for part in script.split(";"))
        command, _, log = drain.partition(" > ")
        options = parser().parse_args(shlex.split(command)[1:])

        # What it says is in the log of the container.
        assert (options.command, log, stop) == ("drain", "/proc/1/fd/1 2>&1", "ray stop"), name
        assert options.deadline_s < spec["terminationGracePeriodSeconds"]
        for deployment in config["applications"][0]["deployments"]:
            graceful_s = deployment["graceful_shutdown_timeout_s"]
            assert AppConfig().limits.max_timeout_ms < graceful_s * 1e3
            # Where replicas have no place to go, they end so long before the deadline: later than HAProxy's idle
            # connections, by which requests come until then.
            assert options.deadline_s - graceful_s > int(FAST["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"].value)
            assert options.deadline_s - graceful_s > HTTPOptions().keep_alive_timeout_s


# --- the Collector ---------------------------------------------------------------------------------------------------


def test_every_component_of_the_collector_pipelines_is_configured() -> None:
    config = yaml.safe_load((HERE / "base" / "collector" / "config.yaml").read_text())
    wait = config["processors"]["tail_sampling"]["decision_wait"]
    assert float(wait.removesuffix("s")) * 1e3 > AppConfig().limits.default_timeout_ms
    pipelines = config["service"]["pipelines"]

    for pipeline in pipelines.values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= config[kind].keys()
        assert pipeline["processors"][0] == "memory_limiter"
    assert set(config["service"]["extensions"]) <= config["extensions"].keys()
    assert {"receivers", "processors", "exporters", "extensions", "service"} == config.keys()


def test_tail_sampling_keeps_slow_failed_and_linked_traces() -> None:
    """That it does is tested with a real Collector (tests/backends)."""
    config = yaml.safe_load((HERE / "base" / "collector" / "config.yaml").read_text())
    policies = {one["name"]: one for one in config["processors"]["tail_sampling"]["policies"]}
    linked = re.findall(r'name == "([a-z_.]+)"', "\n".join(policies["linked"]["ottl_condition"]["span"]))

    assert set(policies) == {"failed", "slow", "decided", "linked", "ordinary"}
    # All traces other than requests; without them a request cannot be explained.
    own = {"ai.inference.batch_forward", "ai.inference.model_load", "ai.autoscaling.decision", "ai.engine.segment"}
    assert set(linked) == own


# --- beside a server on a laptop --------------------------------------------------------------------------------------


def test_compose_runs_the_programs_of_the_manifests_with_their_configurations(tmp_path: Path) -> None:
    folder = HERE.parent / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    everything = built("cpu with all components", tmp_path.resolve())
    containers = {spec["containers"][0]["image"]: spec["containers"][0] for _, spec in pod_specs(everything)}

    assert set(services) == {"slowlens-collector", "slowlens-jaeger", "slowlens-prometheus", "slowlens-grafana"}
    for name, service_ in services.items():
        container = containers[service_["image"]]
        # Retention by size is for the volume of the manifests.
        arguments = [one for one in container.get("args", []) if "retention.size" not in one]
        assert service_.get("command", []) == arguments, name
        for mount in service_["volumes"]:
            source = mount.partition(":")[0]
            assert not source.startswith(".") or (folder / source).exists(), mount
        assert all(port.startswith("127.0.0.1:") for port in service_["ports"]), name


def test_exemplars_lead_to_the_trace_store() -> None:
    sources = yaml.safe_load((HERE / "base" / "grafana" / "datasources.yaml").read_text())["datasources"]
    metrics, traces = sources
    assert metrics["jsonData"]["exemplarTraceIdDestinations"] == [{"name": "trace_id", "datasourceUid": traces["uid"]}]
    there = {one["metadata"]["name"] for one in yaml.safe_load_all((HERE / "base" / "jaeger.yaml").read_text())}
    assert traces["url"] == "http://slowlens-jaeger.slowlens:16686"
    assert "slowlens-jaeger" in there


# --- dashboards and alerts -------------------------------------------------------------------------------------------


def test_metric_names_in_prometheus() -> None:
    """As the Collector's exporter writes them (prometheus translator of opentelemetry-collector-contrib)."""
    names = {spec.name: series(spec) for spec in METRICS}

    assert names["ai.inference.latency"] == "ai_inference_latency_milliseconds"
    assert names["http.server.request.duration"] == "http_server_request_duration_seconds"
    assert names["ai.inference.requests"] == "ai_inference_requests_total"
    assert names["ai.queue.depth"] == "ai_queue_depth"
    assert names["ai.queue.oldest_age_ms"] == "ai_queue_oldest_age_ms_milliseconds"
    assert names["ai.batch.padding_ratio"] == "ai_batch_padding_ratio"
    assert names["ai.gpu.utilization_percent"] == "ai_gpu_utilization_percent"
    assert names["ai.gpu.memory_used_gb"] == "ai_gpu_memory_used_gb_gigabytes"
    assert names["hw.gpu.utilization"] == "hw_gpu_utilization_ratio"
    assert names["hw.gpu.memory.usage"] == "hw_gpu_memory_usage_bytes"
    assert names["hw.temperature"] == "hw_temperature_celsius"
    assert prometheus_name("otel.sdk.exporter.span.exported", "counter", "{span}") == (
        "otel_sdk_exporter_span_exported_total"
    )


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_every_dashboard_query_is_valid_promql_over_our_metrics(uid: str) -> None:
    known = {
        f"{series(spec)}{suffix}"
        for spec in METRICS
        for suffix in (("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",))
    }
    panels = dashboard(uid)["panels"]
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", "1m")
            promql_parser.parse(expr)
            without_labels = re.sub(r"by \([^)]*\)|\{[^}]*\}", "", expr)
            used = set(re.findall(r"\b[a-z]+_[a-z_]+\b", without_labels)) - {"histogram_quantile"}
            assert used, expr
            assert {name for name in used if not name.startswith("otel_sdk_")} <= known, expr
    corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(corners) == len({panel["id"] for panel in panels}) == len(panels)


def test_every_metric_is_on_a_dashboard() -> None:
    shown = json.dumps([dashboard(uid) for uid in DASHBOARDS])
    missing = {spec.name for spec in METRICS if series(spec) not in shown}

    # Exported twice: ai.gpu.* and hw.gpu.* report the same values in different units.
    assert missing == {"ai.gpu.memory_used_gb", "hw.gpu.utilization"}


def test_every_alert_has_a_runbook_with_a_why_command() -> None:
    for alert in ALERTS:
        rule = alert.rule()
        promql_parser.parse(rule["expr"])
        assert re.search(
            r"`slowlens why --source \$TRACES_URL --metrics \$PROMETHEUS_URL --since \d+[mh]`",
            rule["annotations"]["runbook"],
        )
        assert rule["labels"]["severity"] in ("warning", "critical")

"""Telemetry destinations and resource attributes."""

from __future__ import annotations

import pytest

from deployments.config import AppConfig, TelemetryConfig
from deployments.errors import ConfigError
from deployments.telemetry.export.provider import ReplicaIdentity, destination, make_resource

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"


@pytest.mark.parametrize(
    ("environ", "traces", "metrics"),
    [
        ({}, "store", "store"),
        ({ENDPOINT: "http://c:4317"}, "grpc", "grpc"),
        ({ENDPOINT: "http://c:4318"}, "http/protobuf", "http/protobuf"),
        ({ENDPOINT: "http://c:4318", PROTOCOL: "grpc"}, "grpc", "grpc"),
        ({ENDPOINT: "http://c", PROTOCOL: "http/protobuf"}, "http/protobuf", "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, "grpc", "store"),
        ({ENDPOINT: "http://c:4317", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"}, "grpc", "http/protobuf"),
        ({ENDPOINT: "http://c:4317", "OTEL_METRICS_EXPORTER": "none"}, "grpc", "none"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "grpc", "store"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console", "store"),
        ({ENDPOINT: "http://c:4317", "OTEL_SDK_DISABLED": "true"}, "none", "none"),
        ({ENDPOINT: ""}, "store", "store"),
    ],
)
def test_destination(environ: dict[str, str], traces: str, metrics: str) -> None:
    assert (destination("traces", environ), destination("metrics", environ)) == (traces, metrics)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: 'zipkin' is not one of otlp, console, none"),
        ({ENDPOINT: "http://c", PROTOCOL: "http/json"}, "'http/json' is not one of grpc, http/protobuf"),
    ],
)
def test_an_unknown_destination_is_rejected(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        destination("traces", environ)

    assert message in str(refused.value)


def test_our_resource_attributes_override_the_environment_and_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=search,service.namespace=other")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("K8S_POD_NAME", "pod-1")
    monkeypatch.setenv("K8S_NODE_NAME", "node-1")
    config = AppConfig(telemetry=TelemetryConfig(environment="production"))
    attributes = make_resource("model", config, ReplicaIdentity("replica", "node")).attributes

    expected = {
        "team": "search",
        "service.namespace": "slowlens",
        "service.name": "slowlens.model",
        "service.instance.id": "replica",
        "ray.node.id": "node",
        "deployment.environment.name": "production",
        "k8s.pod.name": "pod-1",
        "k8s.node.name": "node-1",
    }
    assert {key: attributes[key] for key in expected} == expected


def test_the_store_is_in_the_xdg_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert str(TelemetryConfig().store_directory()) == "/var/state/slowlens"
    assert str(TelemetryConfig(directory="/data").store_directory()) == "/data"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(TelemetryConfig().store_directory()) == "/home/someone/.local/state/slowlens"

"""``slowlens serve``: ``serve run`` with the environment that makes Serve fast.

Ray reads these variables when it starts, in all its processes, so neither the configuration file nor a ``runtime_env``
can set them. Variables that are already set are left alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.autoscaling.settings import POLICY, PolicySettings
from deployments.cli.supervise import holder_of, supervise
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.errors import ConfigError
from deployments.explain.options import PageConfig


@dataclass(frozen=True, slots=True)
class Setting:
    value: str
    reason: str


FAST: dict[str, Setting] = {
    "RAY_SERVE_ENABLE_HA_PROXY": Setting("1", "HAProxy as the HTTP proxy, instead of one in Python."),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": Setting("1", "Run router, calls and replica code in one event loop."),
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": Setting(
        "0", "Disable the proxy's request count for Ray's dashboard; `http.server.request.duration` has it."
    ),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": Setting(
        "5",
        "How long an ingress that stops still takes requests, until HAProxy knows of it. (Serve's 30 s are longer than "
        "it waits itself when all ends.)",
    ),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": Setting(
        "deployments.http.headers.middlewares",
        "Take away the headers by which a client could turn off Serve's detection of hang-ups, set a timeout of Serve, "
        "or make it fail.",
    ),
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": Setting(
        "75", "How long a client of HAProxy may send or take nothing, instead of an hour."
    ),
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": Setting(
        "1", "How long HAProxy waits for an ingress replica to accept a connection; then it asks another."
    ),
    # Serve writes this as it is into HAProxy's `default-server inter ...`.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": Setting(
        "2s tcp-ut 2s",
        "HAProxy checks ingress replicas every 2 s, and gives a connection up after 2 s in which the other machine has "
        "not acknowledged what was sent. (A replica that is only busy acknowledges: its kernel does.)",
    ),
    "RAY_SERVE_HAPROXY_RETRY_ON": Setting(
        "conn-failure empty-response",
        "A request of up to 16 KiB whose ingress replica died without an answer is sent to another. Inference changes "
        "nothing, so it may be done twice.",
    ),
    "RAY_SERVE_HAPROXY_RETRIES": Setting("1", "Send a request once more, at most: what kills replicas kills only two."),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": Setting(
        "605",
        "When ingress replicas come or go HAProxy is replaced; how long the one before may finish its requests: the "
        "longest deadline (`limits.max_timeout_ms`). (Serve's 120 s cut longer streams.)",
    ),
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": Setting(
        "67108864", "Largest message over gRPC, in bytes, instead of 2 GiB. `limits.max_body_bytes` is checked later."
    ),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": Setting(
        "0.5", "Run the control loop of Serve's controller twice a second, not ten times."
    ),
}
_HTTP_PORT, _GRPC_PORT, _HAPROXY_PORTS = 8000, 9000, (8404, 9101)
IMPORT_PATH, PAGE_IMPORT_PATH = "deployments.app:build", "deployments.page:build"
GATEWAY_IMPORT_PATH = "deployments.gateway:build"


def launch(config: Path, arguments: Sequence[str]) -> int:
    """Run ``serve run CONFIG ARGUMENTS`` until it ends, and return its exit status.

    Raises ConfigError, before anything is started, if the file cannot be read, slowlens' part of it is invalid, or a
    port is taken.
    """
    environment = environment_for(os.environ)
    ports = check(config)
    if not any(one.startswith(("-a", "--address")) for one in arguments):
        _check_ports(ports + (_HAPROXY_PORTS if environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1" else ()))
    for name, value in environment.items():
        note = "" if name not in os.environ else "  (already set)"
        print(f"{name}={value}{note}", file=sys.stderr)  # noqa: T201
    command = ["run", str(config), *arguments]
    print(" ".join(["serve", *command]), file=sys.stderr, flush=True)  # noqa: T201
    return supervise([sys.executable, "-m", "deployments.cli.running", *command], {**os.environ, **environment})


def environment_for(environ: Mapping[str, str]) -> dict[str, str]:
    """Return each variable of ``FAST`` with its value in ``environ``, or else its value in ``FAST``."""
    return {name: environ.get(name, setting.value) for name, setting in FAST.items()}


def check(config: Path) -> tuple[int, ...]:
    """Validate ``args`` of every slowlens application in the file, and return its ports. Raises ConfigError."""
    try:
        content: Any = yaml.safe_load(config.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{config}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{config}: cannot be read: {error}") from None
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list):
        raise ConfigError(f"{config}: must have a list `applications`; see serve_config.yaml of slowlens")
    for application in applications:
        path = application.get("import_path") if isinstance(application, dict) else None
        if path == IMPORT_PATH:
            _check_policies(application.get("deployments") or [])
            ModelCard.load(AppConfig.parse(application.get("args") or {}).model)
        elif path == PAGE_IMPORT_PATH:
            PageConfig.parse(application.get("args") or {})
        elif path == GATEWAY_IMPORT_PATH:
            # Imported only here so that others do not wait for it.
            from deployments.gateway import GatewayConfig

            _check_policies(application.get("deployments") or [])
            GatewayConfig.parse(application.get("args") or {}).parsed()
    ports = [_port_of(content.get("http_options"), _HTTP_PORT)]
    grpc_options = content.get("grpc_options")
    if isinstance(grpc_options, dict) and grpc_options.get("grpc_servicer_functions"):
        ports.append(_port_of(grpc_options, _GRPC_PORT))
    # Anything else is left for Serve to refuse.
    return tuple(port for port in ports if isinstance(port, int))


def _port_of(options: Any, default: int) -> Any:
    return options.get("port", default) if isinstance(options, dict) else default


def _check_policies(deployments: list[Any]) -> None:
    for deployment in deployments:
        scaling = deployment.get("autoscaling_config") if isinstance(deployment, dict) else None
        policy = scaling.get("policy") if isinstance(scaling, dict) else None
        # Other policies, and values that are not mappings, are left for Serve to validate.
        if isinstance(policy, dict) and policy.get("policy_function") == POLICY:
            given = policy.get("policy_kwargs") or {}
            try:
                PolicySettings.parse(given if isinstance(given, dict) else {})
            except ValueError as error:
                raise ConfigError(f"deployments.{deployment.get('name')}.{error}") from None


def _check_ports(ports: Sequence[int]) -> None:
    for port in ports:
        holder = holder_of(port)
        if holder is not None:
            raise ConfigError(
                f"port {port} is taken by {holder}; stop that, or choose another (http_options.port, grpc_options.port)"
            )

"""``slowlens serve``: ``serve run`` with the environment that makes Serve fast.

Ray reads these variables when it starts, in all its processes, so neither the configuration file nor a ``runtime_env``
can set them. Variables that are already set are left alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from deployments.autoscaling.settings import POLICY, PolicySettings
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
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": Setting(
        "0.5", "Run the control loop of Serve's controller twice a second, not ten times."
    ),
}
IMPORT_PATH, PAGE_IMPORT_PATH = "deployments.app:build", "deployments.page:build"


def launch(config: Path, arguments: Sequence[str]) -> NoReturn:
    """Replace this process with ``serve run CONFIG ARGUMENTS``.

    Raises ConfigError, before anything is started, if the file cannot be read or slowlens' part of it is invalid.
    """
    check(config)
    program = _serve()
    environment = environment_for(os.environ)
    for name, value in environment.items():
        note = "" if name not in os.environ else "  (already set)"
        print(f"{name}={value}{note}", file=sys.stderr)  # noqa: T201
    command = [program, "run", str(config), *arguments]
    print(" ".join(command), file=sys.stderr, flush=True)  # noqa: T201
    os.execve(program, command, {**os.environ, **environment})


def environment_for(environ: Mapping[str, str]) -> dict[str, str]:
    """Return each variable of ``FAST`` with its value in ``environ``, or else its value in ``FAST``."""
    return {name: environ.get(name, setting.value) for name, setting in FAST.items()}


def check(config: Path) -> None:
    """Validate ``args`` of every slowlens application in the file. Raises ConfigError."""
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


def _serve() -> str:
    """The ``serve`` next to the running Python, or the first on the path."""
    beside = Path(sys.executable).with_name("serve")
    found = str(beside) if beside.is_file() else shutil.which("serve")
    if found is None:
        raise ConfigError("the command `serve` is not installed; install it with: pip install 'ray[serve]'")
    return found

"""``slowlens serve``: ``serve run`` with the environment that makes Serve fast.

Ray reads these variables when it starts, in all its processes, so neither the configuration file nor a ``runtime_env``
can set them. What the environment says already is left alone.
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
    "RAY_SERVE_ENABLE_HA_PROXY": Setting("1", "HAProxy in front, instead of a proxy in Python."),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": Setting("1", "Router, calls and replica code in one event loop."),
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": Setting(
        "0", "Not the proxy's own count of requests, for Ray's dashboard: `http.server.request.duration` has it."
    ),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": Setting(
        "0.5", "Serve's controller looks at everything twice a second, not ten times."
    ),
}
IMPORT_PATH, PAGE_IMPORT_PATH = "deployments.app:build", "deployments.page:build"


def launch(config: Path, arguments: Sequence[str]) -> NoReturn:
    """Become ``serve run CONFIG ARGUMENTS``.

    Raises ConfigError, before anything is started, where the file cannot be read or our part of it is wrong.
    """
    check(config)
    program = _serve()
    environment = environment_for(os.environ)
    for name, value in environment.items():
        note = "" if name not in os.environ else "  (set before)"
        print(f"{name}={value}{note}", file=sys.stderr)  # noqa: T201
    command = [program, "run", str(config), *arguments]
    print(" ".join(command), file=sys.stderr, flush=True)  # noqa: T201
    os.execve(program, command, {**os.environ, **environment})


def environment_for(environ: Mapping[str, str]) -> dict[str, str]:
    """Each variable of ``FAST`` as it will be: as ``environ`` has it, else as it stands there."""
    return {name: environ.get(name, setting.value) for name, setting in FAST.items()}


def check(config: Path) -> None:
    """Validate ``args`` of every application in the file that is ours. Raises ConfigError."""
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
        # What is none of ours, or no mapping, is for Serve to judge.
        if isinstance(policy, dict) and policy.get("policy_function") == POLICY:
            given = policy.get("policy_kwargs") or {}
            try:
                PolicySettings.parse(given if isinstance(given, dict) else {})
            except ValueError as error:
                raise ConfigError(f"deployments.{deployment.get('name')}.{error}") from None


def _serve() -> str:
    """The ``serve`` beside the running Python, or the first on the path."""
    beside = Path(sys.executable).with_name("serve")
    found = str(beside) if beside.is_file() else shutil.which("serve")
    if found is None:
        raise ConfigError("the command `serve` is not installed; install it with: pip install 'ray[serve]'")
    return found

"""``slowlens serve``: what it checks and sets, and the command that it executes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from deployments.cli import serve
from deployments.cli.main import main
from deployments.cli.serve import FAST, environment_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that would have been run, with their environments; they end with status 3."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def supervise(command: list[str], environment: dict[str, str]) -> int:
        calls.append((command, environment))
        return 3

    monkeypatch.setattr(serve, "supervise", supervise)
    monkeypatch.setattr(serve, "holder_of", lambda _: None)
    for name in FAST:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("arguments", "config", "rest"),
    [
        ([], "serve_config.yaml", []),
        (["serve_config.yaml"], "serve_config.yaml", []),
        (["serve_config.yaml", "--address", "auto", "-h"], "serve_config.yaml", ["--address", "auto", "-h"]),
        (["--non-blocking"], "serve_config.yaml", ["--non-blocking"]),
    ],
)
def test_it_executes_serve_run_with_the_fast_environment(
    supervised: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    config: str,
    rest: list[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["serve", *arguments]) == 3
    ((command, environment),) = supervised

    assert command == [sys.executable, "-m", "deployments.cli.running", "run", config, *rest]
    fast = {name: setting.value for name, setting in FAST.items()}
    assert environment == {**os.environ, **fast}
    printed = capsys.readouterr().err.splitlines()
    assert printed == [*(f"{name}={value}" for name, value in fast.items()), " ".join(["serve run", config, *rest])]


def test_existing_environment_variables_are_kept() -> None:
    name = "RAY_SERVE_ENABLE_HA_PROXY"

    assert environment_for({name: "0", "OTHER": "x"}) == environment_for({}) | {name: "0"}
    assert environment_for({})[name] == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("applications: [", "cannot be read"),
        ("- a\n- b\n", "must have a list `applications`"),
        (
            "applications:\n- import_path: deployments.app:build\n  args: {batching: {max_wait: 5}}\n",
            "args.batching.max_wait: unknown key; known here: max_batch_size",
        ),
        (
            "applications:\n- import_path: deployments.app:build\n  args: {model: {source: /nowhere}}\n",
            "args.model.source: ",
        ),
        (
            "applications:\n- import_path: deployments.app:build\n  deployments:\n"
            "  - name: Model\n    autoscaling_config:\n"
            "      policy: {policy_function: 'deployments.autoscaling:QueueWaitPolicy', policy_kwargs: {quiet: 3}}\n",
            "deployments.Model.autoscaling_config.policy.policy_kwargs.quiet: unknown key; known here: target_queue",
        ),
    ],
)
def test_an_invalid_file_is_rejected_before_anything_starts(
    supervised: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)

    assert main(["serve", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert supervised == []


def test_values_that_are_not_mappings_are_left_to_serve(supervised: list[object], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "applications:\n- import_path: deployments.app:build\n  args: {model: {engine: fake}}\n"
        "  deployments: [{name: Model, autoscaling_config: auto}, 3]\n"
    )
    assert main(["serve", str(config)]) == 3
    assert len(supervised) == 1


def test_other_applications_are_not_checked(supervised: list[object], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("applications:\n- import_path: theirs:app\n  args: {anything: 1}\n")
    assert main(["serve", str(config)]) == 3
    assert len(supervised) == 1

"""The application on the cluster, once for all tests, and the table that they print."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.running import NAMESPACE, Row, apply, callers, is_settled, kubectl, overlay, wait_until

ROWS: list[Row] = []


@pytest.fixture(scope="session")
def image() -> str:
    if not os.environ.get("KUBECONFIG") or not os.environ.get("SLOWLENS_IMAGE"):
        pytest.skip("KUBECONFIG and SLOWLENS_IMAGE name no cluster and no image for it")
    return os.environ["SLOWLENS_IMAGE"]


@pytest.fixture(scope="session")
def applied(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the overlay that runs: ``overlays/cpu`` with the image."""
    folder = overlay(tmp_path_factory.mktemp("overlay").resolve(), "cpu", image)
    with callers():
        apply(folder)
        try:
            wait_until("everything is ready", is_settled, 300)
            yield folder
        finally:
            if not os.environ.get("SLOWLENS_KEEP"):
                kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(params=range(int(os.environ.get("SLOWLENS_ROUNDS", "1"))), ids=lambda one: f"round{one + 1}")
def turn(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def rows() -> list[Row]:
    return ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("disturbances")
    for row in ROWS:
        terminalreporter.write_line(str(row))

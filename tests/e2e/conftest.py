from __future__ import annotations

import pytest

from tests.support.warnings import collect_what_ray_leaves_open, ignore_what_ray_leaves_open


def pytest_configure(config: pytest.Config) -> None:
    ignore_what_ray_leaves_open(config)


def pytest_sessionfinish() -> None:
    collect_what_ray_leaves_open()

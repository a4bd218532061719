from __future__ import annotations

import os
from typing import NoReturn

import pytest
import ray
from hypothesis import settings


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests start no cluster."""

    def forbidden(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test must not start Ray")

    monkeypatch.setattr(ray, "init", forbidden)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


# The duration of one example depends on the machine, not on the code.
settings.register_profile("slowlens", deadline=None)
settings.load_profile("slowlens")

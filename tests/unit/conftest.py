from __future__ import annotations

from typing import NoReturn

import pytest
import ray


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests start no cluster."""

    def forbidden(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test must not start Ray")

    monkeypatch.setattr(ray, "init", forbidden)

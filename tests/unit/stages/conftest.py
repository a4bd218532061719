from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _telemetry_in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The local store of each test, where it does not look elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

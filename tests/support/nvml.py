"""Compile the fake NVML and run Python with it in place of the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
FIRST = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
SECOND = "GPU-bbbbbbbb-1111-1111-1111-111111111111"
SLICE = "MIG-cccccccc-2222-2222-2222-222222222222"


def compile_nvml(folder: Path, *flags: str) -> Path:
    """Build ``libnvidia-ml.so.1`` in the folder and return the folder, for LD_LIBRARY_PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cc", "-shared", "-fPIC", *flags, "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    return folder


def run_with_nvml(folder: Path | None, code: str, **env: str) -> str:
    """Return what ``code`` prints, with the library in ``folder`` (if given) found first."""
    path = {"LD_LIBRARY_PATH": str(folder)} if folder is not None else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

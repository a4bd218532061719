"""Builds the programs, each from a Go module of its own: their dependencies would not agree.

To change a version: edit the module's ``go.mod``, run ``go mod tidy`` there, and say the version in docs/kubernetes.md.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slowlens" / "backends"
_ARGUMENTS = {
    "collector": ["."],
    "jaeger": ["github.com/jaegertracing/jaeger/cmd/jaeger"],
    # Without the clients of all clouds; targets are named by file or in the configuration.
    "prometheus": ["-tags", "remove_all_sd,enable_static_sd", "github.com/prometheus/prometheus/cmd/prometheus"],
}
_DOWNLOAD_S, _BUILD_S = 600, 1500


def program(name: str) -> Path:
    """Return the path of a program, built if it is not in the cache. Skips the test without Go or its module proxy."""
    module = _HERE / name
    sources = b"".join(path.read_bytes() for path in sorted(module.iterdir()))
    built = _CACHE / f"{name}-{hashlib.sha256(sources + repr(_ARGUMENTS[name]).encode()).hexdigest()[:16]}"
    if built.exists():
        return built
    if shutil.which("go") is None:
        pytest.skip(f"{name} is built with Go, which is not here (https://go.dev/dl/)")
    # Done once, it may take longer than a test (faulthandler_timeout of pyproject.toml), after which all would end.
    faulthandler.cancel_dump_traceback_later()
    _CACHE.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"GOFLAGS": "-buildvcs=false -mod=readonly"}
    download = subprocess.run(
        ["go", "mod", "download"], cwd=module, env=environment, capture_output=True, text=True, timeout=_DOWNLOAD_S
    )
    if download.returncode:
        pytest.skip(f"the modules of {name} cannot be downloaded: {download.stderr.strip()[-300:]}")
    partial = built.with_suffix(f".{os.getpid()}")
    subprocess.run(
        ["go", "build", "-o", partial, *_ARGUMENTS[name]], cwd=module, env=environment, check=True, timeout=_BUILD_S
    )
    partial.rename(built)
    return built

"""``serve run`` as a user starts it, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.http import call

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serve_run(config: Path, log: Path, env: dict[str, str], port: int = 8000) -> Iterator[subprocess.Popen[bytes]]:
    """``serve run CONFIG`` until healthy; stopped, with all that it started, at the end of the block."""
    serve = Path(sys.executable).with_name("serve")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(serve), "run", str(config)],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_healthy(port, log, process)
        yield process
    finally:
        stop(process)


def wait_healthy(port: int, log: Path, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if call(port, "GET", "/healthz", timeout_s=5).status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"not healthy (exit {process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as an orchestrator would; what is left of the process group after that is killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)

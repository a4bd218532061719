"""Start ``serve run`` as a user does, and stop it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.http import call

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serve_run(
    config: Path,
    log: Path,
    env: dict[str, str],
    *,
    port: int = 8000,
    health: str = "/healthz",
    until: str | None = None,
    command: tuple[str, ...] = ("serve", "run"),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``serve run CONFIG``, wait until ``health`` returns 200 or its log says ``until``; stop it on exit."""
    assert not is_listening(port), f"something listens on port {port} already"
    program, *arguments = command
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *arguments, str(config)],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: is_healthy(port, health) if until is None else until in log.read_text(errors="replace"),
            log,
            process,
        )
        yield process
    finally:
        stop(process, port)


def with_page(config: str) -> str:
    """serve_config.yaml with the lines of the page as it says: without their first ``#``."""
    return re.sub(r"^#(  .*)$", r"\1", config, flags=re.MULTILINE)


def is_healthy(port: int, path: str) -> bool:
    try:
        return call(port, "GET", path, timeout_s=5).status == 200
    except OSError:
        return False


def wait_for(done: Callable[[], bool], log: Path, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if done():
            return
        time.sleep(0.2)
    raise AssertionError(f"not in {timeout_s} s (exit {process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: subprocess.Popen[bytes], port: int) -> None:
    """Send SIGINT, as Ctrl-C does, so that Serve shuts down in order; then kill what is left of the process group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    # A second signal has ``slowlens serve`` kill what it has started.
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    # The proxy is an actor and may briefly outlive the driver; it must not be mistaken for the next server.
    deadline = time.monotonic() + 60
    while is_listening(port):
        assert time.monotonic() < deadline, f"something still listens on port {port}"
        time.sleep(0.1)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def replicas(stage: str) -> list[int]:
    """Process ids of the replicas of a stage of the application ``slowlens``."""
    found = subprocess.run(["pgrep", "-f", f"ray::ServeReplica:slowlens:{stage}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]

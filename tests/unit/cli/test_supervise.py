"""The process of ``slowlens serve``: signals, exit statuses, and who holds a port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deployments.cli import serve
from deployments.cli.main import main
from deployments.cli.supervise import holder_of, supervise

CHILD = """
    import signal, sys, time
    def end(*_):
        print("ending", flush=True)
        {on_int}
    signal.signal(signal.SIGINT, end)
    print("ready", flush=True)
    time.sleep(60)
"""
PARENT = """
    import os, sys
    from deployments.cli.supervise import supervise
    sys.exit(supervise([sys.executable, "-c", sys.argv[1]], os.environ))
"""


def start(on_int: str) -> subprocess.Popen[str]:
    child = textwrap.dedent(CHILD).replace("{on_int}", on_int)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_the_command_to_end_in_order(number: int) -> None:
    process = start("sys.exit(7)")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("ending\n", 7)
    assert err == "shutting down; once more to kill\n"


def test_a_second_signal_kills_it() -> None:
    process = start("pass")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 15)", 143)])
def test_the_exit_status_is_that_of_the_command(code: str, status: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert supervise([sys.executable, "-c", code], os.environ) == status
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_port_that_is_taken_is_an_error_that_says_by_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "supervise", lambda *_: pytest.fail("it must not start"))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        config = tmp_path / "config.yaml"
        config.write_text(f"http_options: {{port: {port}}}\napplications: []\n")
        assert holder_of(port) is None
        listening.listen()
        name = Path("/proc/self/comm").read_text().strip()
        assert holder_of(port) == f"{name} (pid {os.getpid()})"
        assert main(["serve", str(config)]) == 2
        assert f"port {port} is taken by {name} (pid {os.getpid()})" in capsys.readouterr().err

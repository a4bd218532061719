"""The process of ``slowlens serve``: starts ``serve run`` and passes on the signals that are to end it.

``serve run`` ends in order on SIGINT only: on SIGTERM, which service managers send, it leaves HAProxy behind, with its
ports.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LISTENING = "0A"


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command until it ends, and return its exit status.

    The first signal asks it to end in order, with SIGINT; a further one kills it and all that it has started.
    """
    # In a session of its own, so that a terminal's Ctrl-C comes here alone, once.
    child = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    is_ending = False

    def end(_: int, __: FrameType | None) -> None:
        nonlocal is_ending
        if is_ending:
            os.killpg(child.pid, signal.SIGKILL)
            return
        is_ending = True
        print("shutting down; once more to kill", file=sys.stderr, flush=True)  # noqa: T201
        child.send_signal(signal.SIGINT)

    before = {one: signal.signal(one, end) for one in _SIGNALS}
    try:
        status = child.wait()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return status if status >= 0 else 128 - status


def holder_of(port: int) -> str | None:
    """Who listens on a TCP port of this machine, such as ``haproxy (pid 123)``; None if nobody does. Linux only."""
    sockets = {inode for at, state, inode in tcp_sockets() if (at, state) == (port, _LISTENING)}
    if not sockets:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(held.readlink()) in sockets for held in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            # Of another user, or it has ended.
            continue
    return "a process of another user"


def tcp_sockets(folder: Path = Path("/proc/net")) -> Iterator[tuple[int, str, str]]:
    """Local port, state and name of every TCP socket of this machine. Linux only."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (folder / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *rest = line.split()
            yield int(local.rpartition(":")[2], 16), state, f"socket:[{rest[5]}]"

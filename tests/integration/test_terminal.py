"""``slowlens`` in a real terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.made import moved, otlp, window

SLOWLENS = str(Path(sys.executable).with_name("slowlens"))


class Terminal:
    """The output of a program in a 120-column terminal."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process, self._screen = process, screen
        self.shown = ""

    def until(self, pattern: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.shown):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.shown[-2000:]!r}"
            if select.select([self._screen], [], [], left)[0]:
                try:
                    self.shown += os.read(self._screen, 65536).decode(errors="replace")
                except OSError:
                    # On Linux, reading fails once the other end is closed.
                    assert re.search(pattern, self.shown), f"{pattern!r} is not in {self.shown[-2000:]!r}"


@contextmanager
def terminal(*arguments: str, env: Mapping[str, str] = {}) -> Iterator[Terminal]:
    screen, inner = pty.openpty()
    process = subprocess.Popen(
        [SLOWLENS, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "60", **env},
        start_new_session=True,
    )
    os.close(inner)
    try:
        yield Terminal(process, screen)
    finally:
        process.kill()
        process.wait()
        os.close(screen)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One minute of traces that ends now, with a slow tokenizer."""
    folder = tmp_path / "store"
    folder.mkdir()
    write(folder / "a.jsonl", "tokenize", 0)
    return folder


def write(path: Path, slow: str, seconds_ago: int) -> None:
    spans = window({slow: 90.0}, count=120)
    last = max(one.end_ns for one in spans if one.service == "slowlens.ingress")
    path.write_text(otlp(moved(spans, time.time_ns() - last - seconds_ago * 10**9)))


def test_live_follows_new_traces_until_interrupted(store: Path) -> None:
    with terminal("live", "--source", str(store), "--every", "1s") as shown:
        shown.until(r"(?s)120 requests .*tokenization")
        spans = window({"upload": 700.0}, count=120)
        last = max(one.end_ns for one in spans if one.service == "slowlens.ingress")
        renamed = otlp(moved(spans, time.time_ns() - last)).replace('"traceId": "0', '"traceId": "f')
        (store / "b.jsonl").write_text(renamed)
        shown.until(r"(?s)240 requests .*slow_upload")
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(10) == 0
    assert "Traceback" not in shown.shown


def test_live_waits_for_the_first_request(tmp_path: Path) -> None:
    with terminal("live", "--source", str(tmp_path / "store"), "--every", "1s") as shown:
        shown.until("no traces at .* yet")
        (tmp_path / "store").mkdir()
        shown.until("no request in the last 300 s")
        write(tmp_path / "store" / "a.jsonl", "tokenize", 0)
        shown.until("120 requests")


def test_live_exits_when_the_server_is_unreachable(tmp_path: Path) -> None:
    ended = subprocess.run([SLOWLENS, "live", "--source", "http://127.0.0.1:9"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("slowlens: http://127.0.0.1:9 cannot be reached")


def test_reading_a_large_store_shows_progress(store: Path) -> None:
    (store / "b.jsonl").write_text('{"resourceSpans": []}\n' * 1_500_000)
    with terminal("why", "--source", str(store)) as shown:
        shown.until(r"reading .*\d+%")
        shown.until("tokenization")
        shown.process.wait(30)


@pytest.mark.parametrize(("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_in_a_terminal_unless_no_color_is_set(store: Path, env: dict[str, str], colored: bool) -> None:
    with terminal("why", "--source", str(store), env=env) as shown:
        shown.until("unaccounted|response")
        shown.process.wait(10)
    assert ("\x1b[1;31m1. tokenization" in shown.shown) == colored


def test_piped_output_is_plain_and_the_pipe_may_close_early(store: Path) -> None:
    whole = subprocess.run([SLOWLENS, "why", "--source", str(store)], capture_output=True, text=True, check=True)
    assert "\x1b" not in whole.stdout
    assert not [line for line in whole.stdout.splitlines() if line != line.rstrip()]
    assert whole.stderr == ""

    with subprocess.Popen(
        [SLOWLENS, "trace", "--source", str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(30)
        assert process.stderr is not None
        assert process.stderr.read() == b""

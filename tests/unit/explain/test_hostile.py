"""Traces from strangers: whatever is in them, the answer comes soon, in little memory, and with nothing raw in it."""

from __future__ import annotations

import copy
import gzip
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from deployments.cli.main import main
from deployments.explain.traces.servers import http_api
from tests.support.generations import chats, simulate
from tests.support.made import otlp, window

MAX_S, MAX_MB = 5.0, 500
ESCAPES = "\x1b]0;owned\x07\x1b[31m\x9b31m\u202egnp\r\n"
VALUES = [
    ESCAPES,
    -1,
    10**400,
    "9" * 400,
    "nan",
    float("inf"),
    None,
    True,
    [],
    {},
    [[[]]],
    {"stringValue": ESCAPES},
    "",
]
MOVED = object()
"""Another value of the same document: ids that occur twice, parents in a circle, times of another span."""


def place(part: Any, chance: random.Random) -> tuple[Any, Any]:
    """Some container of a JSON document, and a key of it: deeper with every throw of a coin."""
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = chance.choice(keys)
        child = part[key]
        if not (isinstance(child, dict | list) and child) or chance.random() < 0.1:
            return part, key
        part = child


def leaves_of(part: Any) -> Iterator[Any]:
    if isinstance(part, dict | list):
        for child in part.values() if isinstance(part, dict) else part:
            yield from leaves_of(child)
    else:
        yield part


ENCODER = [json.loads(line) for line in otlp(window({"busy": 300.0}, count=30)).splitlines()]
GENERATIONS = [json.loads(line) for line in otlp(simulate(chats(25, 100.0))).splitlines()]


@pytest.mark.parametrize("document", [ENCODER, GENERATIONS], ids=["encoder", "generations"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), value=st.sampled_from([*VALUES, MOVED]), count=st.integers(1, 200))
def test_whatever_the_values_are(
    document: list[Any], seed: int, value: Any, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage values anywhere: ids, times, names, attributes, links, events, resources, or whole branches."""
    damaged, chance, leaves = copy.deepcopy(document), random.Random(seed), list(leaves_of(document))
    for _ in range(count):
        owner, key = place(damaged, chance)
        owner[key] = chance.choice(leaves) if value is MOVED else copy.deepcopy(value)
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(map(json.dumps, damaged)))
    for arguments in (["why"], ["why", "--format", "json"], ["why", "--format", "html"], ["trace"]):
        assert main([*arguments, "--source", str(path)]) in (0, 1)
        assert_printable(capsys.readouterr())


def assert_printable(captured: Any) -> None:
    for text in captured:
        assert all(char.isprintable() or char in "\n\t" for line in text.splitlines() for char in line)
        assert not set(text) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("ident", ["", "0" * 16, "1" * 16])
@pytest.mark.parametrize("parent", ["", "0" * 16, "1" * 16, "2" * 16])
def test_spans_without_an_id_or_in_a_circle(
    ident: str, parent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the ids of two spans of a request are, the page and the waterfall have an end."""
    lines = copy.deepcopy(ENCODER)
    spans = [
        span
        for line in lines
        for resource in line["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]
    first, second = [span for span in spans if span["name"].startswith("ai.hop")][:2]
    first.update(spanId=ident, parentSpanId=parent)
    second.update(spanId="2" * 16, parentSpanId=ident)
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for arguments in (["why", "--format", "html"], ["trace", first["traceId"]]):
        assert main([*arguments, "--source", str(path)]) == 0
        assert_printable(capsys.readouterr())


def test_escapes_in_every_text_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def escaped(part: Any) -> Any:
        if isinstance(part, list):
            return [escaped(one) for one in part]
        if isinstance(part, dict):
            return {
                key: one + ESCAPES if key == "stringValue" and isinstance(one, str) else escaped(one)
                for key, one in part.items()
            }
        return part

    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(json.dumps(escaped(line)) for line in ENCODER))
    for arguments in (["why"], ["trace"]):
        assert main([*arguments, "--source", str(path)]) == 0
        captured = capsys.readouterr()
        assert_printable(captured)
    assert "\ufffd]0;owned" in captured.out


_MEASURED = """
import sys
from deployments.cli.main import main
status = main()
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
open(sys.argv[-1] + ".peak", "w").write(peak)
sys.exit(status)
"""


def measured(path: Path, *command: str) -> tuple[int, str, float, float]:
    """Run the command in a process of its own: its status, what it said, its seconds, and its memory in MB."""
    began_s = time.monotonic()
    arguments = [sys.executable, "-c", _MEASURED, *command, "--source", str(path)]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    peak = path.with_name(f"{path.name}.peak")
    assert peak.exists(), ran.stderr
    return ran.returncode, ran.stdout + ran.stderr, time.monotonic() - began_s, int(peak.read_text()) / 1024


ZEROS = b"0" * (1 << 20)


def framed_zstd() -> bytes:
    frame = ZstdCompressor().compress(ZEROS * 300)
    return len(frame).to_bytes(4) + frame


BOMBS: dict[str, Callable[[], bytes]] = {
    "gzip.jsonl.gz": lambda: gzip.compress(ZEROS * 300, 6),
    "zstd.jsonl.zst": lambda: ZstdCompressor().compress(ZEROS * 300),
    "framed.json": framed_zstd,
    "deep.jsonl": lambda: b'{"resourceSpans": ' + b"[" * 1_000_000,
    "one-line.jsonl": lambda: b'["' + ZEROS * 100 + b'"]',
    "many-values.jsonl": lambda: b"[" + b"[0]," * 2_900_000 + b"0]",
    "document.json": lambda: b"{\n" + b'"a": [0],\n' * (2 << 20) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_deep_or_large_is_an_error_in_little_time_and_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    status, said, took_s, memory_mb = measured(path, "why")
    assert status == 1, said
    assert said.startswith("slowlens: ")
    assert (memory_mb < MAX_MB, took_s < MAX_S) == (True, True), (memory_mb, took_s)


def test_what_stands_beside_a_bomb_is_read(tmp_path: Path) -> None:
    lines = [json.dumps(line).encode() for line in ENCODER]
    lines.insert(1, b'["' + b"0" * (13 << 20) + b'"]')
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"\n".join(lines))
    status, said, _, _ = measured(path, "why", "--format", "json")
    assert status == 0
    assert json.loads(said[: said.rindex("}") + 1])["requests"] > 20
    assert "1 broken lines or spans were skipped" in said


@contextmanager
def serving(answer: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that hands every request to ``answer``: its address, and the ``Authorization`` it has seen."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLOWLENS_SOURCE_TOKEN", "secret")

    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"{other}/api/traces")
        handler.end_headers()

    def empty(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()

    with serving(empty) as (other, seen_there), serving(elsewhere) as (url, seen_here):
        assert main(["why", "--source", url]) == 1
    assert seen_here
    assert seen_there == []
    assert f"to {other}/api/traces; name that as the source" in capsys.readouterr().err


def test_an_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(http_api, "_MAX_ANSWER", 1 << 20)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"0" * 65536)
        except OSError:
            pass

    with serving(endless) as (url, _):
        assert main(["why", "--source", url]) == 1
    assert "returned more than 1 MiB" in capsys.readouterr().err


def test_an_answer_that_trickles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(http_api, "_TIMEOUT_S", 1)

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                threading.Event().wait(0.05)
        except OSError:
            pass

    with serving(trickle) as (url, _):
        assert main(["why", "--source", url]) == 1
    assert "took more than 1 s to answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"[]", b"7", b'{"data": 7}', b'{"data": [7, [], {"spans": 3}]}', b"null"]
)
def test_answers_that_are_something_else(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def other(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    with serving(other) as (url, _):
        for command in ("why", "trace"):
            assert main([command, "--source", url]) == 1
            assert capsys.readouterr().err.startswith("slowlens: ")


@pytest.mark.parametrize("summary", [{"traceID": ESCAPES}, {}, {"traceID": "1", "startTimeUnixNano": "soon"}])
def test_summaries_of_tempo_that_are_none(summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def tempo(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"echo" if handler.path == "/api/echo" else json.dumps({"traces": [summary]}).encode())

    with serving(tempo) as (url, _):
        for command in ("why", "trace"):
            assert main([command, "--source", url]) == 1
            captured = capsys.readouterr()
            assert_printable(captured)
            assert captured.err.startswith("slowlens: there is no request")

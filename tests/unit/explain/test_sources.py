"""Traces read from files, in every supported format, intact and damaged."""

from __future__ import annotations

import base64
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.otlp import Decoder

TRACE, OTHER = "ab" * 16, "cd" * 16


def span(trace: str, ident: str, name: str = "ai.inference.predict", **more: Any) -> dict[str, Any]:
    times = {"startTimeUnixNano": "1000", "endTimeUnixNano": "2000"}
    return {"traceId": trace, "spanId": ident * 16, "name": name, **times, **more}


def line(*spans: dict[str, Any]) -> bytes:
    return json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": list(spans)}]}]}).encode()


LINES = [line(span(TRACE, "1")), line(span(TRACE, "2", "ai.inference.validate"), span(OTHER, "3", "x"))]


def collector(lines: list[bytes]) -> bytes:
    frames = [zstandard.compress(line) for line in lines]
    return b"".join(len(frame).to_bytes(4) + frame for frame in frames)


FORMS: dict[str, Callable[[list[bytes]], bytes]] = {
    "a.jsonl": b"\n".join,
    "a.jsonl.gz": lambda lines: gzip.compress(b"\n".join(lines)),
    "a.json.zst": lambda lines: zstandard.compress(b"\n".join(lines)),
    # zstd streams may be appended to each other.
    "b.json.zst": lambda lines: b"".join(zstandard.compress(line + b"\n") for line in lines),
    "a.json": collector,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_file_format_yields_the_same_spans(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name](LINES))
    for path in (tmp_path, tmp_path / name):
        source = TraceFiles(path)
        assert [s.span_id[0] for s in source.read()] == ["1", "2", "3"]
        assert {s.name for s in source.trace(TRACE)} == {"ai.inference.predict", "ai.inference.validate"}
        assert source.newest() == TRACE
        assert source.broken == 0


@pytest.mark.parametrize("name", FORMS)
def test_a_truncated_file_yields_the_spans_before_the_truncation(tmp_path: Path, name: str) -> None:
    # Incompressible, so that the truncation falls within the bytes of the second line.
    noise = base64.b85encode(bytes(i * i % 251 for i in range(3000))).decode()
    content = FORMS[name]([LINES[0], line(span(OTHER, "4", noise))])
    (tmp_path / name).write_bytes(content[:-20])
    source = TraceFiles(tmp_path)
    found = [s.span_id[0] for s in source.read()]

    # A gzip or zstd stream may lose the contents of the truncated block.
    assert found == ["1"] or (not found and "." in name[6:])
    assert source.broken == 1


def test_duplicate_spans_and_uppercase_ids_are_one_span(tmp_path: Path) -> None:
    twice = [LINES[0], LINES[0], line(span(TRACE.upper(), "1"))]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(twice))
    assert len(TraceFiles(tmp_path).trace(TRACE)) == 1


def test_linked_spans_of_other_traces_are_found(tmp_path: Path) -> None:
    link = {"traceId": OTHER, "spanId": "3" * 16}
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([line(span(TRACE, "1", links=[link])), LINES[1]]))
    source = TraceFiles(tmp_path)
    assert [s.key for s in source.linked(source.trace(TRACE))] == [(OTHER, "3" * 16)]


def test_a_broken_span_does_not_affect_others(tmp_path: Path) -> None:
    broken = [
        {"traceId": TRACE},
        span(TRACE, "5") | {"endTimeUnixNano": None},
        span(TRACE, "6") | {"traceId": "!" * 24},
        span(TRACE, "7") | {"endTimeUnixNano": "0"},
        7,
    ]
    (tmp_path / "a.jsonl").write_bytes(line(*broken, span(TRACE, "1")) + b'\n[]\n{"resourceSpans": 5}\n\n{"resou')  # type: ignore[arg-type]
    source = TraceFiles(tmp_path)
    assert [s.span_id[0] for s in source.read()] == ["1"]
    assert source.broken == len(broken) + 3


def test_value_types_and_ids_as_written_by_protobuf() -> None:
    values = {
        "int": {"intValue": "7"},
        "double": {"doubleValue": "Infinity"},
        "list": {"arrayValue": {"values": [{"stringValue": "a"}, {"boolValue": True}]}},
        "none": {},
    }
    attributes = [{"key": key, "value": value} for key, value in values.items()]
    as_bytes = {"traceId": base64.b64encode(bytes.fromhex(TRACE)).decode(), "spanId": "AAAAAAAAEjQ="}
    (found,) = Decoder().spans(
        {"batches": [{"scopeSpans": [{"spans": [span(TRACE, "1", attributes=attributes) | as_bytes]}]}]}
    )
    assert found.key == (TRACE, "0000000000001234")
    assert found.attributes == {"int": 7, "double": float("inf"), "list": ["a", True], "none": None}


def test_a_document_that_spans_many_lines_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(json.loads(LINES[1]), indent=2))
    assert [s.span_id[0] for s in TraceFiles(tmp_path / "a.json").read()] == ["2", "3"]


def test_files_not_written_in_the_window_are_skipped(tmp_path: Path) -> None:
    now_ns = time.time_ns()
    for name, written_ns in (("old.jsonl", now_ns - 7200 * 10**9), ("new.jsonl", now_ns)):
        (tmp_path / name).write_bytes(LINES[0])
        os.utime(tmp_path / name, ns=(written_ns, written_ns))
    source = TraceFiles(tmp_path)
    seen: list[tuple[int, int]] = []
    source.on_progress = lambda done, total: seen.append((done, total))
    assert len(list(source.read(since_ns=now_ns - 3600 * 10**9))) == 1
    assert seen[-1] == (len(LINES[0]), len(LINES[0]))
    assert len(list(source.read())) == 2

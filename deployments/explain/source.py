"""Where traces are read from: files of OTLP JSON lines here, servers in ``backends``.

Files are the local store, or what a Collector's file exporter wrote. They are read as streams, once for each question,
so that a large store needs little memory. Compressed ones are told by their first bytes: gzip and zstd files, and the
Collector's own form (``compression: zstd``), in which every object is a zstd frame behind its length (4 bytes,
big-endian).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from zstandard import ZstdDecompressor, ZstdError

from deployments.explain.otlp import Decoder, Span
from deployments.telemetry import names

_ENDINGS = tuple(f".{form}{packed}" for form in ("jsonl", "json") for packed in ("", ".gz", ".zst"))
_CHUNK = 1 << 16
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """Traces, wherever they are.

    Attributes:
        broken: what the last question had to pass over, because it could not be read.
    """

    broken: int

    def newest(self) -> str:
        """The trace id of the request that ended last. Raises LookupError where there is none."""

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace, each once. Raises LookupError where there is none."""

    def linked(self, trace: list[Span]) -> list[Span]:
        """The spans of other traces that these link to."""


class TraceFiles:
    """The traces of a file, or of the files of a folder whose names end in ``.jsonl`` or ``.json`` (``.gz``, ``.zst``).

    Raises FileNotFoundError where there is nothing of that name.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no traces at {path}")
        self._path = path
        self.broken = 0

    def newest(self) -> str:
        requests = (span for span in self.spans(names.PREDICT) if span.name == names.PREDICT)
        newest = max(requests, key=lambda span: span.end_ns, default=None)
        if newest is None:
            raise LookupError("there is no request in these traces yet")
        return newest.trace_id

    def trace(self, trace_id: str) -> list[Span]:
        found = {span.key: span for span in self.spans(trace_id) if span.trace_id == trace_id}
        if not found:
            raise LookupError(f"no span of trace {trace_id} is here")
        return list(found.values())

    def linked(self, trace: list[Span]) -> list[Span]:
        links = {link for span in trace for link in span.links}
        if not links:
            return []
        found = {span.key: span for span in self.spans(*(span_id for _, span_id in links)) if span.key in links}
        return list(found.values())

    def spans(self, *containing: str) -> Iterator[Span]:
        """All spans; or those of lines that contain one of these words, and others that stand beside them.

        ``broken`` then counts, of the other lines, those that were cut short.
        """
        self.broken = 0
        words = [word.encode() for word in containing]
        if self._path.is_dir():
            files = sorted(path for path in self._path.iterdir() if path.name.endswith(_ENDINGS))
        else:
            files = [self._path]
        for path in files:
            yield from self._of_file(path, words)

    def _of_file(self, path: Path, words: list[bytes]) -> Iterator[Span]:
        decoder = Decoder()
        try:
            with path.open("rb") as file:
                for line in _lines(file):
                    lowered = line.lower() if words else b""
                    if not words or any(word in lowered for word in words):
                        yield from self._of_line(line, decoder)
                    else:
                        self.broken += line.strip()[-1:] not in (b"}", b"")
        except FileNotFoundError:
            # The store has removed its oldest file in the meantime.
            return
        except (OSError, EOFError, ZstdError):
            # Compressed, and cut short or damaged: what came before it has been read.
            self.broken += 1
        finally:
            self.broken += decoder.broken

    def _of_line(self, line: bytes, decoder: Decoder) -> Iterator[Span]:
        try:
            data = json.loads(line)
        except ValueError:
            self.broken += bool(line.strip())
        else:
            yield from decoder.spans(data)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """One JSON object each, whatever the file's form."""
    head = file.read(8)
    file.seek(0)
    if head.startswith(_GZIP):
        yield from gzip.GzipFile(fileobj=file)
    elif head.startswith(_ZSTD):
        yield from _zstd_lines(file)
    elif head[4:] == _ZSTD:
        while prefix := file.read(4):
            frame = ZstdDecompressor().decompressobj()
            yield frame.decompress(file.read(int.from_bytes(prefix)))
            if not frame.eof:
                raise EOFError
    else:
        yield from file


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Of one or several zstd frames. Raises EOFError where the last one was cut short."""
    frame = ZstdDecompressor().decompressobj()
    is_open, rest = False, b""
    while packed := file.read(_CHUNK):
        while packed:
            *lines, rest = (rest + frame.decompress(packed)).split(b"\n")
            yield from lines
            packed, is_open = frame.unused_data, not frame.eof
            if frame.eof:
                frame = ZstdDecompressor().decompressobj()
    if is_open:
        raise EOFError
    yield rest

"""The interface of trace sources, and files of OTLP JSON lines; servers are in ``jaeger`` and ``tempo``.

Files are the local store, or the output of a Collector's file exporter. They are streamed, once per query, so that a
large store needs little memory. Compressed files are detected by their first bytes: gzip and zstd files, and the
Collector's own format (``compression: zstd``), in which every object is a zstd frame preceded by its length (4 bytes,
big-endian).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from zstandard import ZstdDecompressor, ZstdError

from deployments.explain.traces.losses import Losses
from deployments.explain.traces.otlp import NOT_OTLP, Decoder, Span, SpanFilter
from deployments.explain.traces.servers.http_api import SourceError
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names

_ENDINGS = tuple(f".{form}{packed}" for form in ("jsonl", "json") for packed in ("", ".gz", ".zst"))
_CHUNK = 1 << 18
_LINES_A_STEP = 200
_CLOCKS_NS = 60 * 10**9
"""Maximum difference between the clocks of a file system and of the processes that write to it."""
_MAX_LINE = 12 * 1024 * 1024
"""Bytes of a line; a longer one is skipped. The Collector writes one for each batch of at most 8,192 spans or so."""
_MAX_FREE, _MAX_RATIO = 64 * 1024 * 1024, 200
"""Bytes that a compressed file may hold in any case, and the most that it may hold for each of its own."""
_ZSTD_CHUNK = 1 << 11
"""A kilobyte of zstd may hold 32 MB."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """A source of traces."""

    @property
    def broken(self) -> int:
        """How many items the last query skipped because they could not be read."""

    @property
    def cut(self) -> int:
        """In how many windows there was more than the store returns at once."""

    @property
    def is_server(self) -> bool:
        """Whether traces reach it by way of others."""

    @property
    def lost(self) -> int:
        """Spans and records that the processes report as lost, in the period of the last ``spans`` call; 0 if there
        are no metrics.
        """

    def newest(self) -> str:
        """Return the trace id of the request that ended last. Raises LookupError if there is none."""

    def trace(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace, each once. Raises LookupError if there are none."""

    def traces(self, trace_ids: Collection[str]) -> list[Span]:
        """Return the spans of these traces that can be found, each once."""

    def linked(self, trace: list[Span]) -> list[Span]:
        """Return the spans of other traces that these link to."""

    def roots(self, since_ns: int) -> Iterator[Root]:
        """Yield the roots of all requests; may omit those that ended before ``since_ns``."""

    def spans(self, survey: Survey) -> Iterator[Span]:
        """Yield the spans that the survey wants, and the runs of its requests; may include others and duplicates."""


@dataclass(frozen=True, slots=True)
class _OnlyRoots:
    def wants(self, name: str, trace_id: str) -> bool:  # noqa: ARG002
        return name == names.PREDICT


class TraceFiles:
    """The traces of a file, or of the files of a folder whose names end in ``.jsonl`` or ``.json`` (``.gz``, ``.zst``).

    Raises FileNotFoundError if the path does not exist.

    Attributes:
        on_progress: called during a query with the bytes read so far and the total.
    """

    is_server = False

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no traces at {path}")
        self._path = path
        self.on_progress: Callable[[int, int], None] = lambda *_: None
        self.broken = self.lost = self.cut = 0

    def newest(self) -> str:
        newest = max(self.roots(0), key=lambda root: root.ended_ns, default=None)
        if newest is None:
            raise LookupError("there is no request in these traces yet")
        return newest.key[0]

    def trace(self, trace_id: str) -> list[Span]:
        found = self.traces({trace_id})
        if not found:
            raise LookupError(f"no spans found for trace {trace_id}")
        return found

    def traces(self, trace_ids: Collection[str]) -> list[Span]:
        if not trace_ids:
            return []
        return list({span.key: span for span in self.read(*trace_ids) if span.trace_id in trace_ids}.values())

    def linked(self, trace: list[Span]) -> list[Span]:
        links = {link for span in trace for link in span.links}
        if not links:
            return []
        found = {span.key: span for span in self.read(*(span_id for _, span_id in links)) if span.key in links}
        return list(found.values())

    def roots(self, since_ns: int) -> Iterator[Root]:
        return map(Root.of, self.read(names.PREDICT, span_filter=_OnlyRoots(), since_ns=since_ns))

    def spans(self, survey: Survey) -> Iterator[Span]:
        losses = Losses(survey.since_ns)
        yield from self.read(span_filter=survey, since_ns=survey.since_ns, losses=losses)
        self.lost = losses.total()

    def read(
        self, *containing: str, span_filter: SpanFilter | None = None, since_ns: int = 0, losses: Losses | None = None
    ) -> Iterator[Span]:
        """Yield all spans, or those that the filter wants. Metrics go to ``losses``.

        With words, only lines that contain one of them are decoded, including any other spans on these lines; of the
        skipped lines, ``broken`` counts those that are truncated. Files of a folder that were not modified since
        ``since_ns`` are skipped.
        """
        self.broken = 0
        words = [word.encode() for word in containing]
        files = self._files(since_ns)
        total = sum(size for _, size in files)
        begun = 0
        for path, size in files:
            decoder = Decoder(span_filter)
            yield from self._of_file(path, words, decoder, losses, begun, total)
            begun += size
        self.on_progress(total, total)

    def _files(self, since_ns: int) -> list[tuple[Path, int]]:
        if not self._path.is_dir():
            return [(self._path, self._path.stat().st_size)]
        files = []
        for path in sorted(path for path in self._path.iterdir() if path.name.endswith(_ENDINGS)):
            # The store may remove its oldest file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime_ns >= since_ns - _CLOCKS_NS:
                    files.append((path, status.st_size))
        return files

    def _of_file(
        self, path: Path, words: list[bytes], decoder: Decoder, losses: Losses | None, begun: int, total: int
    ) -> Iterator[Span]:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(_lines(file)):
                    if number % _LINES_A_STEP == 0:
                        self.on_progress(begun + file.tell(), total)
                    lowered = line.lower() if words else b""
                    if not words or any(word in lowered for word in words):
                        yield from self._of_line(line, decoder, losses)
                    else:
                        self.broken += line.strip()[-1:] not in (b"}", b"")
        except FileNotFoundError:
            return
        except (OSError, EOFError, ZstdError, zlib.error):
            # Compressed, and truncated or damaged: everything before that point has been read.
            self.broken += 1
        finally:
            self.broken += decoder.broken

    def _of_line(self, line: bytes, decoder: Decoder, losses: Losses | None) -> Iterator[Span]:
        try:
            data = json.loads(line)
            if losses is not None and "resourceMetrics" in data:
                losses.add(data)
        except NOT_OTLP:
            self.broken += bool(line.strip())
        else:
            yield from decoder.spans(data)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield one JSON object at a time, whatever the file's format.

    Raises EOFError if a compressed file is truncated, SourceError if it holds suspiciously much.
    """
    head = file.read(8)
    file.seek(0)
    if head.startswith(_GZIP):
        unpacked = gzip.GzipFile(fileobj=file)
        yield from _split(_bounded(file, iter(lambda: unpacked.read(_CHUNK), b"")))
    elif head.startswith(_ZSTD):
        yield from _split(_bounded(file, _zstd(file)))
    elif head[4:] == _ZSTD:
        yield from _split(_bounded(file, _framed_zstd(file)))
    elif file.readline(_MAX_LINE).strip() in (b"{", b"["):
        # One document that spans many lines.
        file.seek(0)
        yield file.read(_MAX_LINE)
    else:
        file.seek(0)
        yield from _split(iter(lambda: file.read(_CHUNK), b""))


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Unpack one or more frames."""
    frame, is_open = ZstdDecompressor().decompressobj(), False
    while packed := file.read(_ZSTD_CHUNK):
        while packed:
            yield frame.decompress(packed)
            packed, is_open = frame.unused_data, not frame.eof
            if frame.eof:
                frame = ZstdDecompressor().decompressobj()
    if is_open:
        raise EOFError


def _framed_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Unpack the Collector's own format, with a newline after every object."""
    while prefix := file.read(4):
        frame, left = ZstdDecompressor().decompressobj(), int.from_bytes(prefix)
        while left and (packed := file.read(min(left, _ZSTD_CHUNK))):
            yield frame.decompress(packed)
            left -= len(packed)
        if not frame.eof:
            raise EOFError
        yield b"\n"


def _bounded(file: BinaryIO, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on what a compressed file holds. Raises SourceError if no telemetry is ever compressed so far."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > _MAX_FREE and size > _MAX_RATIO * file.tell():
            raise SourceError(f"the traces are compressed more than {_MAX_RATIO}-fold, which no telemetry is; not read")
        yield piece


def _split(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines; of one that is too long, its beginning, which is no JSON."""
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *others = piece.split(b"\n")
        if size <= _MAX_LINE:
            parts.append(first)
        size += len(first)
        if others:
            yield b"".join(parts)
            *whole, last = others
            yield from whole
            parts, size = [last], len(last)
    yield b"".join(parts)

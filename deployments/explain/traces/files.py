"""Where traces are read from: files of OTLP JSON lines here, servers in ``backends``.

Files are the local store, or what a Collector's file exporter wrote. They are read as streams, once for each question,
so that a large store needs little memory. Compressed ones are told by their first bytes: gzip and zstd files, and the
Collector's own form (``compression: zstd``), in which every object is a zstd frame behind its length (4 bytes,
big-endian).
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from zstandard import ZstdDecompressor, ZstdError

from deployments.explain.traces.losses import Losses
from deployments.explain.traces.otlp import Decoder, Span, SpanFilter
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names

_ENDINGS = tuple(f".{form}{packed}" for form in ("jsonl", "json") for packed in ("", ".gz", ".zst"))
_CHUNK = 1 << 16
_LINES_A_STEP = 200
_CLOCKS_NS = 60 * 10**9
"""By how much the clocks of a file system and of the processes that write to it may differ."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """Traces, wherever they are.

    Attributes:
        broken: what the last question had to pass over, because it could not be read.
        lost: spans and records that the processes say they lost, in the time of the last ``spans``; 0 where no metrics
            are there.
    """

    broken: int
    lost: int

    def newest(self) -> str:
        """The trace id of the request that ended last. Raises LookupError where there is none."""

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace, each once. Raises LookupError where there is none."""

    def traces(self, trace_ids: Collection[str]) -> list[Span]:
        """The spans of these traces, as far as they are there, each once."""

    def linked(self, trace: list[Span]) -> list[Span]:
        """The spans of other traces that these link to."""

    def roots(self, since_ns: int) -> Iterator[Root]:
        """Of all requests; it may leave out those that ended before ``since_ns``."""

    def spans(self, survey: Survey) -> Iterator[Span]:
        """Those that the survey wants, and the runs of its requests. It may give more, and one twice."""


@dataclass(frozen=True, slots=True)
class _OnlyRoots:
    def wants(self, name: str, trace_id: str) -> bool:  # noqa: ARG002
        return name == names.PREDICT


class TraceFiles:
    """The traces of a file, or of the files of a folder whose names end in ``.jsonl`` or ``.json`` (``.gz``, ``.zst``).

    Raises FileNotFoundError where there is nothing of that name.

    Attributes:
        on_progress: is told, while a question is answered, how many of how many bytes have been read.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no traces at {path}")
        self._path = path
        self.on_progress: Callable[[int, int], None] = lambda *_: None
        self.broken = self.lost = 0

    def newest(self) -> str:
        newest = max(self.roots(0), key=lambda root: root.ended_ns, default=None)
        if newest is None:
            raise LookupError("there is no request in these traces yet")
        return newest.key[0]

    def trace(self, trace_id: str) -> list[Span]:
        found = self.traces({trace_id})
        if not found:
            raise LookupError(f"no span of trace {trace_id} is here")
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
        """All spans, or those that are wished for; with words only those of lines that contain one of them, and others
        that stand beside them. Metrics go to ``losses``. Files of a folder that nobody wrote to since ``since_ns`` are
        passed over.

        ``broken`` then counts, of the other lines, those that were cut short.
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
        except (OSError, EOFError, ZstdError):
            # Compressed, and cut short or damaged: what came before it has been read.
            self.broken += 1
        finally:
            self.broken += decoder.broken

    def _of_line(self, line: bytes, decoder: Decoder, losses: Losses | None) -> Iterator[Span]:
        try:
            data = json.loads(line)
            if losses is not None and "resourceMetrics" in data:
                losses.add(data)
        except (ValueError, KeyError, TypeError, AttributeError):
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
    elif file.readline().strip() in (b"{", b"["):
        # One document over many lines.
        file.seek(0)
        yield file.read()
    else:
        file.seek(0)
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

"""Destinations of finished spans: the local store, the SDK's exporters, or none."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor

from deployments.telemetry.export.otlp_json import JsonEncoder, readable
from deployments.telemetry.export.span import Span
from deployments.telemetry.export.store import JsonLines

_MAX_LINE_SPANS = 512
_MAX_AGE_S = 0.5
"""Maximum time before a span is written to the store."""
_logger = logging.getLogger("slowlens.telemetry")


class SpanSink(Protocol):
    wants_spans: bool
    unwritten: int
    """Total number of spans that could not be handed on."""

    def take(self, span: Span) -> None: ...

    def tick(self) -> None:
        """Called several times a second from the thread that calls ``take``."""
        ...

    def close(self) -> None: ...


class NoSink:
    wants_spans = False
    unwritten = 0

    def take(self, span: Span) -> None:
        pass

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


class SdkSink:
    """Exports through the SDK's processor; ``OTEL_BSP_*`` configures its queue, batches and retries."""

    wants_spans = True
    unwritten = 0
    """The SDK counts these itself (``otel.sdk.*``)."""

    def __init__(self, processor: SpanProcessor, resource: Resource) -> None:
        self._processor, self._resource = processor, resource

    def take(self, span: Span) -> None:
        self._processor.on_end(readable(span, self._resource))

    def tick(self) -> None:
        pass

    def close(self) -> None:
        self._processor.shutdown()


class StoreSink:
    """Writes lines to the local store, each with the spans of about half a second."""

    wants_spans = True

    def __init__(self, lines: JsonLines, resource: Resource) -> None:
        self.unwritten = 0
        self._lines, self._encoder = lines, JsonEncoder(resource)
        self._spans: list[bytes] = []
        self._oldest_s = 0.0
        self._lock = threading.Lock()

    def take(self, span: Span) -> None:
        text = self._encoder.span(span)
        with self._lock:
            if not self._spans:
                self._oldest_s = time.monotonic()
            self._spans.append(text)
        if len(self._spans) >= _MAX_LINE_SPANS:
            self._write()

    def tick(self) -> None:
        if self._spans and time.monotonic() - self._oldest_s >= _MAX_AGE_S:
            self._write()

    def close(self) -> None:
        self._write()
        self._lines.close()

    def _write(self) -> None:
        with self._lock:
            spans, self._spans = self._spans, []
        if not spans:
            return
        try:
            self._lines.write(self._encoder.line(spans))
        except OSError as error:
            self.unwritten += len(spans)
            _logger.warning("cannot write to the local store, %d spans are lost: %s", len(spans), error)

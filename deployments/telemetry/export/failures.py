"""What the SDK's exporters log when they fail: each kind of failure once an hour, with what to do about it.

A collector that is away, or a backend that takes traces only, would otherwise fill the log of every replica: an
exporter logs each attempt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_EXPORTERS = "opentelemetry.exporter"
_AGAIN_S = 3600.0
_MOST_KINDS = 100
_HINT = "; if what is there takes traces only, set OTEL_METRICS_EXPORTER=none"
_logger = logging.getLogger("slowlens.telemetry")


class SaidOnce(logging.Handler):
    """Passes on to our own log what is new.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: dict[tuple[str, ...], tuple[float, int]] = {}
        """By kind of failure: when it was said, and how often it has happened since."""

    def emit(self, record: logging.LogRecord) -> None:
        kind, now_s = _kind_of(record), self._clock()
        said_s, count = self._said.get(kind, (now_s - _AGAIN_S, 0))
        if now_s - said_s < _AGAIN_S:
            self._said[kind] = said_s, count + 1
            return
        if len(self._said) >= _MOST_KINDS:
            self._said.clear()
        self._said[kind] = now_s, 0
        again = f" ({count} more of these in the hour before)" if count else ""
        is_of_metrics = "metrics" in (record.name + " " + " ".join(kind))
        hint = _HINT if is_of_metrics and record.levelno >= logging.ERROR else ""
        _logger.log(record.levelno, "%s%s%s; said once an hour", record.getMessage(), hint, again)


def say_failures_once() -> None:
    """Let the SDK's exporters of this process log through ``SaidOnce``. May be called again."""
    logger = logging.getLogger(_EXPORTERS)
    if not any(isinstance(handler, SaidOnce) for handler in logger.handlers):
        logger.addHandler(SaidOnce())
        logger.propagate = False


def _kind_of(record: logging.LogRecord) -> tuple[str, ...]:
    """What makes two failures the same: the message without its numbers, and which signal failed how."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    return record.name, record.msg, *(str(one) for one in arguments[:3] if not isinstance(one, int | float))

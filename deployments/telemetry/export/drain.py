"""The hand-over from the request path to the telemetry thread: a bounded queue, and one thread that empties it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

MAX_RECORDS = 20_000
_INTERVAL_S = 0.1
_RECORDS_AT_ONCE = 8
_logger = logging.getLogger("slowlens.telemetry")


class Drain:
    """Queues records, and calls ``export`` with those that are queued ten times a second, in a thread of its own.

    Args:
        export: takes the queued records and the number of records lost since its last call.
        max_records: records beyond this number are lost.
    """

    def __init__(self, export: Callable[[Iterator[object], int], None], max_records: int = MAX_RECORDS) -> None:
        self._export, self._max_records = export, max_records
        self._queue: deque[object] = deque()
        self._lost = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="slowlens-telemetry", daemon=True)
        self._thread.start()

    def put(self, record: object) -> None:
        """From the request path: costs an append."""
        if len(self._queue) >= self._max_records:
            self._lost += 1
        else:
            self._queue.append(record)

    def lose(self) -> None:
        """Count a record that could not be exported."""
        self._lost += 1

    def flush(self) -> None:
        """Export everything queued so far, in the calling thread."""
        with self._lock:
            lost = self._lost
            self._export(self._records(), lost)
            self._lost -= lost

    def close(self) -> None:
        """Stop the thread, and export what is left."""
        self._stopped.set()
        self._thread.join(timeout=5)
        self.flush()

    def _work(self) -> None:
        has_failed = False
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self.flush()
            except Exception:
                # This thread must outlive whatever an exporter or a callback raises; one stack trace says it.
                if not has_failed:
                    _logger.exception("telemetry could not be flushed; further failures are not logged")
                has_failed = True

    def _records(self) -> Iterator[object]:
        for number in range(len(self._queue)):
            yield self._queue.popleft()
            if number % _RECORDS_AT_ONCE == 0:
                # Yield the GIL to the event loop now, not only at the interpreter's next switch.
                time.sleep(0)

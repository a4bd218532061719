"""A device that the test controls, behind the real gate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deployments.batching.cost import RunCost
from deployments.batching.entry import Batch, BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import GateLimits
from tests.support.virtual_time import now_ns

FOREVER = 2**62
_WORKERS = 2
"""As in the replica: one runs its batch, one holds the batch that is ready to follow."""


class Device:
    """Pulls the batches that the gate releases; each run continues until the test ends it."""

    def __init__(self, *, clock: Callable[[], int] | None = None, **limits: float) -> None:
        self.now_ns = 0
        values = {"max_batch_size": 4, "max_batch_tokens": 100, "max_wait_ms": 0, "max_queue": 100} | limits
        self.gate: AdmissionGate[str] = AdmissionGate(
            GateLimits(**values),  # type: ignore[arg-type]
            clock or (lambda: self.now_ns),
        )
        self.runs: list[Batch[str]] = []
        self._pulled: list[Batch[str]] = []
        self._idle_workers = _WORKERS

    def _pull(self) -> None:
        """Let the idle workers ask for a batch."""
        while self._idle_workers:
            self._idle_workers -= 1
            asyncio.ensure_future(self.gate.next_batch()).add_done_callback(self._take)

    def _take(self, pulled: asyncio.Future[Batch[str]]) -> None:
        if not pulled.cancelled():
            self._pulled.append(pulled.result())

    def ready(self) -> list[str]:
        """Return the payloads of the batch that is ready to follow the run."""
        waiting = [batch for batch in self._pulled if not batch.has_started]
        return [entry.payload for entry in waiting[0].present] if waiting else []

    async def start(self) -> list[str]:
        """Start one run of what the gate has released. Return its payloads."""
        await settle()
        while not self._pulled[0].present:
            # As the device thread does: all its entries were cancelled.
            await self._put_back(self._pulled[0])
        return self.start_next(self._pulled[0])

    def start_next(self, batch: Batch[str] | None = None) -> list[str]:
        """Start the batch that is ready to follow, although the end of the previous run has not been reported yet."""
        batch = batch or next(batch for batch in self._pulled if not batch.has_started)
        self.gate.begin(batch)
        self.runs.append(batch)
        return [entry.payload for entry in batch.present]

    async def end(self) -> None:
        batch = self._pulled[0]
        for entry in batch.present:
            entry.deliver(f"done {entry.payload}")
        await self._put_back(batch)

    async def _put_back(self, batch: Batch[str]) -> None:
        self._pulled.remove(batch)
        self._idle_workers += 1
        self.gate.end(batch)
        self._pull()
        await settle()

    def submit(self, *names: str, tokens: int = 1, deadline_ns: int = FOREVER) -> asyncio.Task[list[object]]:
        return self.submit_entries([BatchEntry(name, tokens, deadline_ns) for name in names])

    def submit_entries(self, entries: list[BatchEntry[str]]) -> asyncio.Task[list[object]]:
        self._pull()
        return asyncio.ensure_future(self.gate.submit(entries))


def timed_device(**limits: float) -> Device:
    """A device on the event loop's clock whose runs are expected to take 40 ms."""
    device = Device(clock=now_ns, **limits)
    device.gate.planner.cost = RunCost(run_ns=40e6, token_ns=1)
    return device


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)

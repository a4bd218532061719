"""A device that the test holds in its hand, behind the real gate."""

from __future__ import annotations

import asyncio

from deployments.batching.cost import RunCost
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import GateLimits, Item
from tests.support.virtual_time import now_ns

FOREVER = 2**62


class Device:
    """Runs what the gate releases; each run lasts until the test ends it."""

    def __init__(self, **limits: float) -> None:
        self.now_ns = 0
        values = {"max_batch_size": 4, "max_batch_tokens": 100, "max_wait_ms": 0, "max_queue": 100} | limits
        self.gate: AdmissionGate[str] = AdmissionGate(GateLimits(**values), self._execute, lambda: self.now_ns)  # type: ignore[arg-type]
        self.runs: list[list[Item[str]]] = []
        self._arrived: list[tuple[Item[str], asyncio.Future[str]]] = []

    async def _execute(self, item: Item[str]) -> str:
        done = asyncio.get_running_loop().create_future()
        self._arrived.append((item, done))
        return await done

    def ready(self) -> list[str]:
        """Who is in the batch that is ready to follow the run."""
        following = self.gate._released[1] if len(self.gate._released) > 1 else set()
        return [item.payload for item, _ in self._arrived if item in following]

    async def start(self) -> list[str]:
        """Start one run of all that the gate has released. Returns who is in it."""
        await settle()
        first = self.gate._released[0] if self.gate._released else set()
        items = [item for item, done in self._arrived if item in first and not done.done()]
        self.gate.begin(items)
        self.runs.append(items)
        return [item.payload for item in items]

    async def end(self) -> None:
        items = self.runs[-1]
        self.gate.end(items)
        for item, done in self._arrived:
            if item in items and not done.done():
                done.set_result(f"done {item.payload}")
        self._arrived = [(item, done) for item, done in self._arrived if item not in items]
        await settle()

    def submit(self, *names: str, tokens: int = 1, deadline_ns: int = FOREVER) -> asyncio.Task[list[object]]:
        return asyncio.ensure_future(self.gate.submit([Item(name, tokens, deadline_ns) for name in names]))


def timed_device(**limits: float) -> Device:
    """Its clock is the loop's, and its runs are expected to take 40 ms."""
    device = Device(**limits)
    device.gate._clock = now_ns
    device.gate.cutter.cost = RunCost(run_ns=40e6, token_ns=1)
    return device


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)

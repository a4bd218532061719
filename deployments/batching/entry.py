"""An input in the queue, and the batch that takes it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from deployments.batching.fairness import Order
from deployments.messages import NOBODYS, Share

DispatchReason = Literal["full", "token_budget", "timeout", "device_idle", "deadline"]
Payload = TypeVar("Payload")
NEVER = -1
"""A time that has not been set."""


@dataclass(eq=False, slots=True)
class BatchEntry(Generic[Payload]):
    """One input from its arrival in the queue to its result. Times are monotonic nanoseconds of this process.

    Attributes:
        result: awaited by the input's caller. The runner of the batch sets it with ``deliver`` or ``fail``.
    """

    payload: Payload
    tokens: int
    deadline_ns: int
    share: Share = NOBODYS
    order: Order = (0, 0.0)
    """Its place in the queue."""
    padded: int = 0
    """Tokens after padding, if the input runs alone."""
    arrived_ns: int = NEVER
    depth_on_arrival: int = 0
    busy_total_at_arrival_ns: int = 0
    started_ns: int = NEVER
    left_ns: int = NEVER
    """When it was withdrawn without having run."""
    busy_wait_ns: int = 0
    batch: Batch[Payload] | None = None
    """The batch that took it from the queue."""
    result: asyncio.Future[Any] = field(init=False)

    @property
    def has_started(self) -> bool:
        return self.started_ns != NEVER

    @property
    def is_gone(self) -> bool:
        """Whether it was withdrawn before it ran."""
        return self.left_ns != NEVER

    @property
    def wait_ns(self) -> int:
        return (self.started_ns if self.has_started else self.left_ns) - self.arrived_ns

    @property
    def fill_wait_ns(self) -> int:
        return self.wait_ns - self.busy_wait_ns

    def deliver(self, output: Any) -> None:
        """Set the result, unless the caller is gone or the entry has already ended."""
        if not self.result.done():
            self.result.set_result(output)

    def fail(self, error: Exception) -> None:
        """Set the exception, unless the caller is gone or the entry has already ended."""
        if not self.result.done():
            self.result.set_exception(error)


@dataclass(eq=False, slots=True)
class Batch(Generic[Payload]):
    """Inputs that run together."""

    entries: list[BatchEntry[Payload]]
    reason: DispatchReason
    """Why the batch was released."""
    started_ns: int = NEVER
    queue_behind: int = 0
    """Inputs still in the queue when it started."""

    @property
    def has_started(self) -> bool:
        return self.started_ns != NEVER

    @property
    def present(self) -> list[BatchEntry[Payload]]:
        """Entries whose callers are still waiting, or were when the batch started."""
        return [entry for entry in self.entries if not entry.is_gone]

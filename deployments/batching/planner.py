"""What goes into the next batch: the choice among the waiting inputs, and what the device taught about its runs.

A batch is the oldest waiting input and those that cost least to run with it (see ``grouping``), within limits of inputs
and padded tokens, made smaller until all that are in it meet their deadlines.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from deployments.batching.cost import RunCost
from deployments.batching.grouping import front, with_the_first

DispatchReason = Literal["full", "token_budget", "timeout", "device_idle", "deadline", "drain"]
Payload = TypeVar("Payload")
NEVER = -1
"""A time that has not come."""
_REGROWTH = 1.02
"""By which a limit learned from an out-of-memory grows with every run that fitted."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    """``batching`` of the configuration, and what the engine rounds lengths up to."""

    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: float
    max_queue: int
    max_queue_tokens: int = 2**62
    grouping_window: int = 1
    pad_to_multiple_of: int = 1


@dataclass(eq=False, slots=True)
class Item(Generic[Payload]):
    """One input on its way through the gate. Times are monotonic nanoseconds of this process."""

    payload: Payload
    tokens: int
    deadline_ns: int
    padded: int = 0
    """Tokens as the engine pads them in a run of its own."""
    arrived_ns: int = NEVER
    depth_on_arrival: int = 0
    busy_total_at_arrival_ns: int = 0
    started_ns: int = NEVER
    left_ns: int = NEVER
    """When it left without having run."""
    busy_wait_ns: int = 0
    reason: DispatchReason | None = None
    queue_behind: int = 0
    admitted: asyncio.Future[None] = field(init=False)

    @property
    def has_started(self) -> bool:
        return self.started_ns != NEVER

    @property
    def is_gone(self) -> bool:
        """Whether its caller gave it up before it ran."""
        return self.left_ns != NEVER

    @property
    def wait_ns(self) -> int:
        return (self.started_ns if self.has_started else self.left_ns) - self.arrived_ns

    @property
    def fill_wait_ns(self) -> int:
        return self.wait_ns - self.busy_wait_ns


class BatchCutter:
    """Cuts batches within ``limits``, by what runs were seen to cost and to need."""

    def __init__(self, limits: GateLimits) -> None:
        self.limits = limits
        self.cost = RunCost()
        self._memory_tokens = float("inf")

    @property
    def max_batch_tokens(self) -> int:
        """Of a batch now: as configured, or what fits the memory."""
        return int(min(self.limits.max_batch_tokens, self._memory_tokens))

    def observe(self, padded_tokens: int, took_ns: float) -> None:
        """A run of so many padded tokens took so long."""
        self.cost.observe(padded_tokens, took_ns)
        self._memory_tokens *= _REGROWTH

    def ran_out_of_memory(self, padded_tokens: int) -> None:
        """A run of so many padded tokens did not fit."""
        self._memory_tokens = min(self._memory_tokens, padded_tokens / 2)

    def rounded(self, tokens: int) -> int:
        """As the engine pads an input in a run of its own."""
        multiple = self.limits.pad_to_multiple_of
        return -(-tokens // multiple) * multiple

    def padded_tokens(self, items: Sequence[Item[Payload]]) -> int:
        """Of a run of these items."""
        return max(item.padded for item in items) * len(items)

    def run_ns(self, items: Sequence[Item[Payload]]) -> float:
        """What a run of these items is expected to take."""
        return self.cost.estimate(self.padded_tokens(items))

    def tokens_per_second(self, padded: float) -> float:
        """What the device runs, in full batches of inputs of so many padded tokens."""
        size = max(1, min(self.limits.max_batch_size, int(self.max_batch_tokens // max(1.0, padded))))
        tokens = size * padded
        return tokens / (self.cost.run_ns + self.cost.token_ns * tokens) * 1e9

    def is_late(self, item: Item[Payload], now_ns: int) -> bool:
        """Whether it misses its deadline even in a run of its own that starts now."""
        return now_ns + self.cost.estimate(item.padded) > item.deadline_ns

    def may_be_full(self, count: int, tokens: int) -> bool:
        """Cheaply, whether so many inputs of so many tokens in all could fill a batch."""
        return count >= self.limits.max_batch_size or tokens >= self.max_batch_tokens

    def cut(self, waiting: Collection[Item[Payload]], now_ns: int) -> tuple[list[Item[Payload]], DispatchReason]:
        """The next batch, and what ended it. ``waiting`` is in order of arrival and not empty."""
        limits, max_tokens = self.limits, self.max_batch_tokens
        window = list(itertools.islice(waiting, max(limits.grouping_window, limits.max_batch_size)))
        lengths = [item.padded for item in window]
        if limits.grouping_window > 1:
            batch = [window[i] for i in with_the_first(lengths, self.cost, limits.max_batch_size, max_tokens)]
        else:
            batch = window[: front(lengths, limits.max_batch_size, max_tokens)]
        if self._shrink_to_deadlines(batch, now_ns):
            return batch, "deadline"
        if len(batch) == limits.max_batch_size:
            return batch, "full"
        in_order_of_arrival = limits.grouping_window <= 1
        if self.padded_tokens([*batch, batch[0]]) > max_tokens or (in_order_of_arrival and len(batch) < len(window)):
            return batch, "token_budget"
        return batch, "device_idle"

    def _shrink_to_deadlines(self, batch: list[Item[Payload]], now_ns: int) -> bool:
        """Take the longest out, but never the oldest, until the rest meet their deadlines. Returns whether any went."""
        size = len(batch)
        while len(batch) > 1:
            if now_ns + self.run_ns(batch) <= min(item.deadline_ns for item in batch):
                break
            batch.remove(max(batch[1:], key=lambda item: item.padded))
        return len(batch) < size

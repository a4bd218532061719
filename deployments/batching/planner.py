"""What goes into the next batch: the choice among the waiting inputs, and what runs have taught about the device.

A batch is the oldest waiting input and those that cost least to run with it (see ``grouping``), within limits of inputs
and padded tokens, made smaller until all its inputs meet their deadlines.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deployments.batching.cost import RunCost
from deployments.batching.entry import Batch, BatchEntry, DispatchReason, Payload
from deployments.batching.grouping import fifo_prefix, group_with_oldest

_REGROWTH = 1.02
"""Factor by which a limit learned from an out-of-memory error grows with every run that fitted."""


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


class BatchPlanner:
    """Forms batches within ``limits``, by the measured time and memory of past runs."""

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

    def padded_tokens(self, entries: Sequence[BatchEntry[Payload]]) -> int:
        """Of a run of these entries."""
        return max(entry.padded for entry in entries) * len(entries)

    def run_ns(self, entries: Sequence[BatchEntry[Payload]]) -> float:
        """Expected duration of a run of these entries."""
        return self.cost.estimate(self.padded_tokens(entries))

    def tokens_per_second(self, padded: float) -> float:
        """What the device runs, in full batches of inputs of so many padded tokens."""
        size = max(1, min(self.limits.max_batch_size, int(self.max_batch_tokens // max(1.0, padded))))
        tokens = size * padded
        return tokens / (self.cost.run_ns + self.cost.token_ns * tokens) * 1e9

    def is_late(self, entry: BatchEntry[Payload], now_ns: int) -> bool:
        """Whether it misses its deadline even in a run of its own that starts now."""
        return now_ns + self.cost.estimate(entry.padded) > entry.deadline_ns

    def may_be_full(self, count: int, tokens: int) -> bool:
        """Cheaply, whether so many inputs of so many tokens in all could fill a batch."""
        return count >= self.limits.max_batch_size or tokens >= self.max_batch_tokens

    def next_batch(self, waiting: Collection[BatchEntry[Payload]], now_ns: int) -> Batch[Payload]:
        """The batch that would run next. ``waiting`` is in order of arrival and not empty; it is left as it is."""
        limits, max_tokens = self.limits, self.max_batch_tokens
        window = list(itertools.islice(waiting, max(limits.grouping_window, limits.max_batch_size)))
        lengths = [entry.padded for entry in window]
        if limits.grouping_window > 1:
            entries = [window[i] for i in group_with_oldest(lengths, self.cost, limits.max_batch_size, max_tokens)]
        else:
            entries = window[: fifo_prefix(lengths, limits.max_batch_size, max_tokens)]
        was_shrunk = self._shrink_to_deadlines(entries, now_ns)
        return Batch(entries, "deadline" if was_shrunk else self._reason(entries, len(window)))

    def _reason(self, entries: Sequence[BatchEntry[Payload]], waiting: int) -> DispatchReason:
        limits = self.limits
        if len(entries) == limits.max_batch_size:
            return "full"
        is_fifo = limits.grouping_window <= 1
        one_more = self.padded_tokens([*entries, entries[0]])
        if one_more > self.max_batch_tokens or (is_fifo and len(entries) < waiting):
            return "token_budget"
        return "device_idle"

    def _shrink_to_deadlines(self, entries: list[BatchEntry[Payload]], now_ns: int) -> bool:
        """Remove the longest, but never the oldest, until the rest meet their deadlines. Returns whether any went."""
        size = len(entries)
        while len(entries) > 1:
            if now_ns + self.run_ns(entries) <= min(entry.deadline_ns for entry in entries):
                break
            entries.remove(max(entries[1:], key=lambda entry: entry.padded))
        return len(entries) < size

"""Chooses the inputs of the next batch, using what was learned about the device from past runs.

A batch consists of the oldest waiting input and the inputs that are cheapest to run with it (see ``grouping``), within
the limits on inputs and padded tokens, shrunk until all its inputs meet their deadlines.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deployments.batching.cost import RunCost
from deployments.batching.entry import Batch, BatchEntry, DispatchReason, Payload
from deployments.batching.grouping import fifo_prefix, group_with_oldest
from deployments.config import BatchingConfig

_LEAST_OF_FIXED = 4
"""What the tokens of a run may always cost, in times of the run's fixed cost."""
_CAUTION = 1.15
"""Factor on what a run is expected to take that must end before a deadline: ending a little later, it was in vain."""
_REGROWTH = 1.02
"""Factor by which a limit learned from an out-of-memory error grows with every run that fits."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    """The ``batching`` section of the configuration, and the multiple that the engine rounds lengths up to."""

    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: float
    max_queue: int
    max_queue_tokens: int = 2**62
    grouping_window: int = 1
    pad_to_multiple_of: int = 1
    max_run_ms: float = float("inf")


def limits_of(config: BatchingConfig, pad_to_multiple_of: int = 1) -> GateLimits:
    """The limits that the configuration sets."""
    return GateLimits(
        config.max_batch_size,
        config.max_batch_tokens,
        config.max_wait_ms,
        config.max_queue,
        config.max_queue_tokens,
        config.grouping_window,
        pad_to_multiple_of,
        config.max_run_ms,
    )


class BatchPlanner:
    """Forms batches within ``limits``, based on the measured time and memory of past runs."""

    def __init__(self, limits: GateLimits) -> None:
        self.limits = limits
        self.cost = RunCost()
        self._memory_tokens = float("inf")

    @property
    def max_batch_tokens(self) -> int:
        """Current limit of a batch: as configured, or what fits in memory or runs in ``max_run_ms`` if that is less."""
        return max(1, int(min(self.limits.max_batch_tokens, self._memory_tokens, self._tokens_in_time())))

    def _tokens_in_time(self) -> float:
        """Tokens of the longest run. Its fixed cost is at most a fifth of it; else batches would waste the device."""
        cost = self.cost
        return max(self.limits.max_run_ms * 1e6 - cost.run_ns, _LEAST_OF_FIXED * cost.run_ns) / cost.token_ns

    def observe(self, padded_tokens: int, took_ns: float) -> None:
        """Learn from a run of ``padded_tokens`` that took ``took_ns``."""
        self.cost.observe(padded_tokens, took_ns)
        self._memory_tokens *= _REGROWTH

    def ran_out_of_memory(self, padded_tokens: int) -> None:
        """Learn that a run of ``padded_tokens`` did not fit in memory."""
        self._memory_tokens = min(self._memory_tokens, padded_tokens / 2)

    def rounded(self, tokens: int) -> int:
        """Length to which the engine pads an input that runs alone."""
        multiple = self.limits.pad_to_multiple_of
        return -(-tokens // multiple) * multiple

    def padded_tokens(self, entries: Sequence[BatchEntry[Payload]]) -> int:
        """Padded tokens of a run of these entries."""
        return max(entry.padded for entry in entries) * len(entries)

    def run_ns(self, entries: Sequence[BatchEntry[Payload]]) -> float:
        """Expected duration of a run of these entries."""
        return self.cost.estimate(self.padded_tokens(entries))

    def runs_ns(self, count: int, tokens: int) -> float:
        """Expected duration of the runs of so many inputs with so many padded tokens in total, in full batches."""
        runs = max(-(-count // self.limits.max_batch_size), -(-tokens // self.max_batch_tokens))
        return runs * self.cost.run_ns + tokens * self.cost.token_ns

    def tokens_per_second(self, padded: float) -> float:
        """Throughput of the device in full batches of inputs with ``padded`` tokens each."""
        size = max(1, min(self.limits.max_batch_size, int(self.max_batch_tokens // max(1.0, padded))))
        tokens = size * padded
        return tokens / (self.cost.run_ns + self.cost.token_ns * tokens) * 1e9

    def is_late(self, entry: BatchEntry[Payload], now_ns: int) -> bool:
        """Whether the entry misses its deadline even in a run of its own that starts now."""
        return now_ns + self.cost.estimate(entry.padded) > entry.deadline_ns

    def may_be_full(self, count: int, tokens: int) -> bool:
        """Cheap check whether ``count`` inputs with ``tokens`` tokens in total could fill a batch."""
        return count >= self.limits.max_batch_size or tokens >= self.max_batch_tokens

    def next_batch(self, waiting: Collection[BatchEntry[Payload]], now_ns: int) -> Batch[Payload]:
        """Return the batch that would run next. ``waiting`` is in order of arrival, not empty, and not modified."""
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
        """Remove the longest, but never the oldest, until the rest meet their deadlines. Returns whether it did."""
        size = len(entries)
        while len(entries) > 1:
            if now_ns + _CAUTION * self.run_ns(entries) <= min(entry.deadline_ns for entry in entries):
                break
            entries.remove(max(entries[1:], key=lambda entry: entry.padded))
        return len(entries) < size

"""Groups waiting inputs by length: the split into runs with the lowest total cost.

A run costs ``a + b * padded tokens`` (see ``cost``), and every input in it is padded to the longest. Running a short
input with long ones saves a separate run (``a``) but wastes padding. Which is cheaper depends on the device, so the
estimated cost decides: on a GPU ``a`` outweighs much padding, on a CPU hardly any.
"""

from __future__ import annotations

from collections.abc import Sequence

from deployments.batching.cost import RunCost


def group_with_oldest(lengths: Sequence[int], cost: RunCost, max_size: int, max_tokens: int) -> list[int]:
    """Return the indices of the inputs that share a run with ``lengths[0]`` in the cheapest split of all into runs.

    Args:
        lengths: tokens of each waiting input as the engine pads them, oldest first.
        cost: cost of a run.
        max_size: maximum inputs per run.
        max_tokens: maximum padded tokens per run; a longer input runs alone.

    Returns:
        Indices in order of arrival, including 0.
    """
    count = fifo_prefix(lengths, max_size, max_tokens)
    waste = max(lengths[:count]) * count - sum(lengths[:count])
    if cost.token_ns * waste <= cost.run_ns:
        # Another run costs more than all the padding that it could save.
        return list(range(count))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    starts = _cheapest_split([lengths[i] for i in order], cost, max_size, max_tokens)
    position = order.index(0)
    end = len(order)
    while starts[end] > position:
        end = starts[end]
    return sorted(order[starts[end] : end])


def fifo_prefix(lengths: Sequence[int], max_size: int, max_tokens: int) -> int:
    """Return how many inputs fit into one run, in order of arrival."""
    longest = 0
    for count, length in enumerate(lengths[:max_size]):
        longest = max(longest, length)
        if count and longest * (count + 1) > max_tokens:
            return count
    return min(len(lengths), max_size)


def _cheapest_split(ascending: Sequence[int], cost: RunCost, max_size: int, max_tokens: int) -> list[int]:
    """For each prefix, return the start of its last run. Dynamic programming over runs of inputs adjacent in length."""
    best = [0.0]
    starts = [0]
    a, b = cost.run_ns, cost.token_ns
    for end in range(1, len(ascending) + 1):
        longest = ascending[end - 1]
        most = max(1, min(max_size, max_tokens // longest, end))
        cheapest, start = best[end - 1] + a + b * longest, end - 1
        for size in range(2, most + 1):
            total = best[end - size] + a + b * longest * size
            if total < cheapest:
                cheapest, start = total, end - size
        best.append(cheapest)
        starts.append(start)
    return starts

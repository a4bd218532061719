"""What one replica reports about its load: the numbers of ``record_autoscaling_stats``. Standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Measured by ``meters``, read by Serve twice a second."""

    queue_depth: float = 0.0
    """Inputs (requests in stages without batches) waiting in the replica."""
    oldest_age_ms: float = 0.0
    """How long the oldest of them has waited."""
    queue_wait_ms: float = 0.0
    """Time the replica needs to run everything waiting in it, at its observed rate."""
    demand: float = 0.0
    """Seconds of work for the replica that arrive per second, over the last few seconds, refused requests included.
    Above 1 it cannot keep up."""
    demand_now: float = 0.0
    """The same over the last second."""
    throughput: float = 0.0
    """Inputs per second that it can run, by its observed rate."""
    start_ms: float = 0.0
    """Time from the start of its constructor until it was ready."""

    def stats(self) -> dict[str, float]:
        return asdict(self)

    @property
    def is_credible(self) -> bool:
        # Written out for speed: there may be thousands of reports, several times a second. An infinity or NaN in any
        # value carries over to the sum.
        values = (
            self.queue_depth,
            self.oldest_age_ms,
            self.queue_wait_ms,
            self.demand,
            self.demand_now,
            self.throughput,
            self.start_ms,
        )
        return min(values) >= 0 and math.isfinite(sum(values))

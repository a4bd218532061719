"""What one replica says of its load: the numbers of ``record_autoscaling_stats``. Standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Measured by ``meters``, read by Serve twice a second."""

    queue_depth: float = 0.0
    """Inputs (in stages without batches: requests) that wait in it."""
    oldest_age_ms: float = 0.0
    """How long the first of them has waited."""
    queue_wait_ms: float = 0.0
    """How long it would take this replica to run all that waits in it, at the rate that it is seen to run."""
    demand: float = 0.0
    """Seconds of its work that arrive per second, refused requests included: of the last seconds. Above 1 it cannot
    keep up."""
    demand_now: float = 0.0
    """The same of the last second."""
    throughput: float = 0.0
    """Inputs a second that it can run, as it is seen to run them."""
    start_ms: float = 0.0
    """How long it took from the start of its constructor until it was ready."""

    def stats(self) -> dict[str, float]:
        return asdict(self)

    @property
    def is_credible(self) -> bool:
        # Written out: there may be thousands, several times a second. Infinity or NaN in one of them is in the sum.
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

"""Announces decisions to operators: a log line for each change, spans and metrics, all from a separate thread.

The controller does not wait for any of it, and imports neither Ray's client nor OpenTelemetry for it.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from deployments.autoscaling.decide import Decision

logger = logging.getLogger("slowlens.autoscaling")


@dataclass(frozen=True, slots=True)
class Announcement:
    """A decision on one deployment. Times are Unix nanoseconds."""

    application: str
    deployment: str
    seen_unix_ns: int
    """When the newest report behind the decision was taken, by its replica's clock."""
    decided_unix_ns: int
    max_replicas: int
    target_queue_wait_ms: float
    decision: Decision

    def stated(self) -> dict[str, Any]:
        """The attributes of the decision's span, without their prefix."""
        made = {one.name: getattr(self.decision, one.name) for one in fields(Decision) if one.name != "memory"}
        return made | {"max_replicas": self.max_replicas, "target_queue_wait_ms": self.target_queue_wait_ms}

    def __str__(self) -> str:
        made = self.decision
        limit = f", and max_replicas is {self.max_replicas}" if made.reason == "at_max" else ""
        return (
            f"{self.deployment}: {made.from_replicas} -> {made.to_replicas} replicas ({made.reason}, "
            f"{made.needed_replicas} needed{limit}), {made.running_replicas} running, {made.reports} of them reported; "
            f"{made.queue_depth} inputs waiting, {made.queue_wait_ms:.0f} ms of work (target "
            f"{self.target_queue_wait_ms:g} ms), the oldest for {made.oldest_age_ms:.0f} ms; demand {made.demand:.2f} "
            f"replicas at {made.throughput:.1f} inputs per second each; a replica starts in "
            f"{made.start_ms / 1e3:.1f} s"
        )


Announce = Callable[[Announcement, bool], None]
"""Called with every decision, and whether it is news."""


def start_announcing(owner: object, directory: str | None) -> Announce:
    """Start a thread that logs and exports decisions until ``owner`` is gone; return the function that feeds it."""
    set_up_logging()
    queued: queue.SimpleQueue[tuple[Announcement, bool] | None] = queue.SimpleQueue()
    threading.Thread(target=_announce_all, args=(queued, directory), name="slowlens-autoscaling", daemon=True).start()
    weakref.finalize(owner, queued.put, None)
    return lambda announcement, is_news: queued.put((announcement, is_news))


def set_up_logging() -> None:
    """Add a handler: Serve's controller sets up only Serve's own loggers."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)


def _announce_all(queued: queue.SimpleQueue[tuple[Announcement, bool] | None], directory: str | None) -> None:
    telemetry: Any = None
    last: tuple[str, str] | None = None
    try:
        # Not at the top: the controller must not wait for OpenTelemetry, and may have been given only this package.
        import ray

        from deployments.telemetry.decisions import ScalingRecord, decision_telemetry

        telemetry = decision_telemetry(directory, ray.get_runtime_context().get_node_id())
    except Exception as error:
        logger.warning("decisions are only logged, not exported: %r", error)
    while (item := queued.get()) is not None:
        made, is_news = item
        if is_news:
            logger.info("%s", made)
        if telemetry is not None:
            last = made.application, made.deployment
            record = ScalingRecord(*last, made.seen_unix_ns, made.decided_unix_ns, made.stated())
            try:
                telemetry.take(record, is_news)
            except Exception as error:
                logger.warning("a decision could not be exported: %r", error)
    if telemetry is not None and last is not None:
        telemetry.forget(*last)

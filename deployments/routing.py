"""Which model replica a call goes to: the one with the least work.

Serve's own router compares calls in hand. A call carries one request or many, of a few tokens or thousands, so that the
replica with fewer calls may be the one with more to do.

1. The work of a call is the tokens of its requests. A caller knows what it has sent and what is not answered yet.
2. What others have sent, each replica reports (``record_routing_stats``, once a second): what it has to do, less what
   of that is one's own.
3. Out of a few replicas drawn at random, the one with the least to do; callers that all saw the same one idle would
   otherwise all run there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

ROUTER = "deployments.routing:LeastWorkRouter"
STATS_PERIOD_S = 1.0
WORK = "work"
"""What ``record_routing_stats`` calls the tokens that a replica has to run."""
_DRAWN = 8
_EACH = 16
"""Tokens' worth of work that every request is, beside its tokens."""


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """For calls whose first argument is a tuple of requests with ``ids`` (``messages.PredictRequest``)."""

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[str, tuple[ReplicaID, int]] = {}
        self._own: Counter[ReplicaID] = Counter()
        self._others: dict[ReplicaID, float] = {}
        self._reports: dict[ReplicaID, Mapping[str, Any]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002 - Serve's signature
    ) -> list[list[RunningReplica]]:
        drawn = random.sample(candidate_replicas, min(_DRAWN, len(candidate_replicas)))
        drawn.sort(key=lambda replica: self.work(replica.replica_id))
        # One by one: Serve takes the first that has room.
        return [[replica] for replica in drawn]

    def work(self, replica_id: ReplicaID) -> float:
        """Tokens that the replica has to run, as far as it is known here."""
        return self._own[replica_id] + self._others.get(replica_id, 0.0)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come, go or report."""
        for replica in replicas:
            report = replica.routing_stats
            if WORK in report and report is not self._reports.get(replica.replica_id):
                self._reports[replica.replica_id] = report
                self._others[replica.replica_id] = max(0.0, report[WORK] - self._own[replica.replica_id])
        there = {replica.replica_id for replica in replicas}
        for known in (self._own, self._others, self._reports):
            for gone in known.keys() - there:
                del known[gone]
        super().update_replicas(replicas)

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002 - Serve's signature
    ) -> None:
        work = sum(map(_work, pending_request.args[0]))
        self._sent[pending_request.metadata.internal_request_id] = replica_id, work
        self._own[replica_id] += work

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        _, work = self._sent.pop(internal_request_id, (replica_id, 0))
        if replica_id in self._own:
            self._own[replica_id] -= work


def _work(request: Any) -> int:
    lengths: tuple[int, ...] = request.ids.lengths
    return sum(lengths) + _EACH * len(lengths)

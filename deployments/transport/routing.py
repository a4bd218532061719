"""Which model replica a call goes to: the one with the least work.

Serve's own router compares calls in hand. A call carries one request or many, of a few tokens or thousands, so that the
replica with fewer calls may be the one with more to do.

1. The work of a call is the tokens of its requests. A caller knows what it has sent and what is not answered yet. That
   is never stale; what replicas report once a second is, and callers that follow it run from one replica to the next.
   A call counts from when it is sent, as one of the usual size until the replica has taken it.
2. Out of a few replicas drawn at random, the one with the least to do; callers that all have nothing under way would
   otherwise all go to the same one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

ROUTER = "deployments.transport.routing:LeastWorkRouter"
_DRAWN = 8
_WEIGHT = 0.1
"""Of the newest call in what is usual."""
_EACH = 16
"""Tokens' worth of work that every request is, beside its tokens."""


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """For calls whose first argument is a tuple of requests with ``ids`` (``messages.PredictRequest``).

    Calls of other methods of the deployment are no work.
    """

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[tuple[ReplicaID, str], int] = {}
        self._own: Counter[ReplicaID] = Counter()
        self._on_their_way: Counter[ReplicaID] = Counter()
        self._usual = 0.0

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
        """Tokens that were sent to the replica from here and are not answered."""
        return self._own[replica_id] + self._usual * self._on_their_way[replica_id]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come or go."""
        there = {replica.replica_id for replica in replicas}
        for counted in (self._own, self._on_their_way):
            for gone in counted.keys() - there:
                del counted[gone]
        super().update_replicas(replicas)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._on_their_way[replica_id] += 1

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002 - Serve's signature
    ) -> None:
        """The replica has taken the call."""
        self._arrived(replica_id)
        work = _work(pending_request.args)
        if work:
            self._usual += _WEIGHT * (work - self._usual)
        self._sent[replica_id, pending_request.metadata.internal_request_id] = work
        self._own[replica_id] += work

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The call is answered; or, where it never was taken, refused."""
        work = self._sent.pop((replica_id, internal_request_id), None)
        if work is None:
            self._arrived(replica_id)
        elif replica_id in self._own:
            self._own[replica_id] -= work

    def _arrived(self, replica_id: ReplicaID) -> None:
        self._on_their_way[replica_id] = max(0, self._on_their_way[replica_id] - 1)


def _work(args: Sequence[Any]) -> int:
    requests = args[0] if args and isinstance(args[0], tuple) else ()
    lengths: list[int] = [length for request in requests if hasattr(request, "ids") for length in request.ids.lengths]
    return sum(lengths) + _EACH * len(lengths)

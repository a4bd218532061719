"""Routes each call to the model replica with the least work.

Serve's own router compares the number of outstanding calls. A call carries one request or many, of a few tokens or
thousands, so the replica with fewer calls may have more work.

1. The work of a call is the number of tokens of its requests. A caller knows what it has sent and what has no reply
   yet. That is never stale, unlike what replicas report once a second: callers that follow those reports swing from
   one replica to the next. A call counts from when it is sent, at the average size until the replica has accepted it.
2. Of a few replicas sampled at random, the one with the least work is chosen; otherwise callers with nothing
   outstanding would all choose the same one.
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

from deployments.messages import Call, PredictRequest

ROUTER = "deployments.transport.routing:LeastWorkRouter"
_SAMPLED = 8
_WEIGHT = 0.1
"""Weight of the newest call in the average size."""
_TOKENS_PER_REQUEST = 16
"""Work of a request in addition to its tokens, in tokens."""


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """For actor calls whose first argument is a tuple of ``Call[PredictRequest]``.

    Calls to other methods of the deployment count as no work.
    """

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[tuple[ReplicaID, str], int] = {}
        self._own: Counter[ReplicaID] = Counter()
        self._sent_not_taken: Counter[ReplicaID] = Counter()
        self._usual = 0.0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002 - Serve's signature
    ) -> list[list[RunningReplica]]:
        sampled = random.sample(candidate_replicas, min(_SAMPLED, len(candidate_replicas)))
        sampled.sort(key=lambda replica: self.work(replica.replica_id))
        # One replica per rank: Serve takes the first that has capacity.
        return [[replica] for replica in sampled]

    def work(self, replica_id: ReplicaID) -> float:
        """Tokens that this router has sent to the replica and that have no reply yet."""
        return self._own[replica_id] + self._usual * self._sent_not_taken[replica_id]

    @property
    def tracked(self) -> set[ReplicaID]:
        """Replicas that calls are counted for."""
        return {*self._own, *self._sent_not_taken}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas are added or removed."""
        there = {replica.replica_id for replica in replicas}
        for counted in (self._own, self._sent_not_taken):
            for gone in counted.keys() - there:
                del counted[gone]
        super().update_replicas(replicas)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent_not_taken[replica_id] += 1

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002 - Serve's signature
    ) -> None:
        """Called by Serve when the replica has accepted the call."""
        self._arrived(replica_id)
        work = _work(pending_request.args)
        if work:
            self._usual += _WEIGHT * (work - self._usual)
        self._sent[replica_id, pending_request.metadata.internal_request_id] = work
        self._own[replica_id] += work

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when the call has its reply, or was rejected without being accepted."""
        work = self._sent.pop((replica_id, internal_request_id), None)
        if work is None:
            self._arrived(replica_id)
        elif replica_id in self._own:
            self._own[replica_id] -= work

    def _arrived(self, replica_id: ReplicaID) -> None:
        self._sent_not_taken[replica_id] = max(0, self._sent_not_taken[replica_id] - 1)


def _work(args: Sequence[Any]) -> int:
    calls = args[0] if args and isinstance(args[0], tuple) else ()
    requests = [call.request for call in calls if isinstance(call, Call) and isinstance(call.request, PredictRequest)]
    lengths = [length for request in requests for length in request.ids.lengths]
    return sum(lengths) + _TOKENS_PER_REQUEST * len(lengths)

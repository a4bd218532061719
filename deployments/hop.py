"""A hop: one actor call from the ingress to a stage, for one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from deployments.errors import DeadlinePassed, NoReplicaReady, QueueFull, ReplicaDied
from deployments.messages import Envelope, Reply
from deployments.readiness import Readiness
from deployments.telemetry.names import Service
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import HopRecord, RequestRecord

_CONTROLLER_PATIENCE_S = 1.0
_GRACE_S = 0.1
Result = TypeVar("Result")


class Hop:
    """The way to one stage.

    Args:
        stage: its name.
        method: the handle's method. It takes a tuple of requests and returns a tuple of replies.
        telemetry: for the hop's span.
        readiness: whether the stage has a replica, asked only of calls that wait for one.
        no_replica_wait_ms: how long a call may wait for a first replica.
    """

    def __init__(
        self,
        stage: Service,
        method: DeploymentHandle[Any],
        telemetry: Telemetry,
        readiness: Readiness,
        no_replica_wait_ms: float,
    ) -> None:
        self._stage, self._method, self._telemetry = stage, method, telemetry
        self._readiness, self._no_replica_wait_s = readiness, no_replica_wait_ms / 1000

    async def call(
        self,
        record: RequestRecord,
        deadline_ns: int,
        request: Callable[[Envelope], Any],
        result: type[Result],
    ) -> Result:
        """Send ``request(envelope)`` and return the stage's result.

        Raises:
            ApiError: the stage's own failure, or 504 (deadline), 503 (no replica), 429 (queue before the stage full).
            asyncio.CancelledError: the client hung up; the call is cancelled in the stage too.
        """
        with self._telemetry.hop(record, self._stage) as hop:
            remaining_ms = (deadline_ns - time.monotonic_ns()) / 1e6
            if remaining_ms <= 0:
                raise DeadlinePassed(f"the deadline passed before the {self._stage}")
            envelope = Envelope(
                self._telemetry.carrier_of(record, hop), record.request_id, remaining_ms, time.time_ns()
            )
            (reply,) = await self._answer((request(envelope),), deadline_ns)
            return self._open(reply, hop, result)

    async def _answer(self, group: tuple[Any, ...], deadline_ns: int) -> tuple[Reply[Any], ...]:
        call = asyncio.ensure_future(self._send(group))
        try:
            await asyncio.wait([call], timeout=min(_left_s(deadline_ns), self._no_replica_wait_s))
            if not call.done() and not await self._has_replica() and not call.done():
                raise NoReplicaReady(f"no replica of the {self._stage} is ready", retry_after_s=5)
            if not call.done():
                # The stage keeps the deadline itself and says where the time went; it has a moment to say so.
                await asyncio.wait([call], timeout=_left_s(deadline_ns) + _GRACE_S)
            if not call.done():
                raise DeadlinePassed(f"the deadline passed at the {self._stage}")
            return call.result()
        finally:
            # Cancels the call in the stage too, where it is still running.
            call.cancel()

    async def _has_replica(self) -> bool:
        """Whether to wait on. A controller that does not answer says nothing about replicas."""
        missing = await self._readiness.missing(_CONTROLLER_PATIENCE_S)
        return missing is None or self._stage not in missing

    async def _send(self, group: tuple[Any, ...]) -> tuple[Reply[Any], ...]:
        response = self._method.remote(group)
        try:
            return await response  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            # Serve cancels the calls of a request that it cancels itself (a hang-up); our deadlines it cannot know.
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except BackPressureError as error:
            raise QueueFull(
                f"{error.args[0]} requests wait for the {self._stage}, the most that may; try again later",
                retry_after_s=1,
            ) from None
        except DeploymentUnavailableError:
            raise NoReplicaReady(f"the {self._stage} failed to deploy", retry_after_s=30) from None
        except (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError):
            raise ReplicaDied(
                f"the replica of the {self._stage} died under this request; try again", retry_after_s=1
            ) from None
        except (RequestCancelledError, TaskCancelledError):
            raise asyncio.CancelledError from None

    def _open(self, reply: Reply[Any], hop: HopRecord, result: type[Result]) -> Result:
        hop.held_ns, hop.answered = reply.held_ns, True
        if reply.failure is not None:
            raise reply.failure.error()
        assert isinstance(reply.result, result)
        return reply.result


def _left_s(deadline_ns: int) -> float:
    return max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)

"""The client of one stage: calls are awaited like HTTP requests, and failures are raised."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from deployments.errors import Cancelled, DeadlinePassed, NoReplicaReady, QueueFull, ReplicaDied
from deployments.messages import Call, Envelope, Reply
from deployments.telemetry.names import Service
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import HopRecord, RequestRecord
from deployments.transport.coalescing import Replies, SharedCalls
from deployments.transport.readiness import Readiness

_CONTROLLER_TIMEOUT_S = 1.0
_GRACE_S = 0.1
MAX_COST_US = 5_000
"""Of a shared call in the stage: how long a request may have to wait for the others. A larger request is sent alone."""
_logger = logging.getLogger("slowlens.ingress")


class StageRequest(Protocol):
    @property
    def cost_us(self) -> int:
        """Approximate time the request keeps the stage busy."""


Request = TypeVar("Request", bound=StageRequest)
Result = TypeVar("Result")


class StageClient(Generic[Request, Result]):
    """Sends requests to one stage.

    Args:
        stage: its name.
        handle: the deployment's handle.
        method: the method to call. It takes a tuple of calls and returns a tuple of replies. With ``replies_as_ready``
            it yields tuples of ``(index of the call, reply)``, and the deployment has a method ``forget`` that takes a
            tuple of traceparents.
        telemetry: records the hop's span.
        readiness: reports whether the stage has a replica; queried only for calls that wait for one.
        no_replica_wait_ms: how long a call may wait for a first replica.
        max_cost_us: maximum cost of one actor call.
        cooldown_factor, is_busy: see ``SharedCalls``.
    """

    def __init__(
        self,
        stage: Service,
        handle: DeploymentHandle[Any],
        method: str,
        *,
        telemetry: Telemetry,
        readiness: Readiness,
        no_replica_wait_ms: float,
        replies_as_ready: bool = False,
        max_cost_us: int = MAX_COST_US,
        cooldown_factor: float = 0.0,
        is_busy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._stage, self._telemetry, self._replies_as_ready = stage, telemetry, replies_as_ready
        self._readiness, self._no_replica_wait_s = readiness, no_replica_wait_ms / 1000
        # By value: over gRPC instead of Ray's object store, at half the cost per call.
        self._handle = handle.options(
            method_name=method,
            stream=replies_as_ready,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        self._calls = SharedCalls(
            self._exchange,
            max_cost_us,
            pipelined=replies_as_ready,
            cooldown_factor=cooldown_factor,
            is_busy=is_busy,
            forget=self._forget if replies_as_ready else None,
        )

    async def call(self, record: RequestRecord, request: Request) -> Result:
        """Send ``request`` on behalf of ``record``'s HTTP request, and return the stage's result.

        Raises:
            ApiError: the stage's own failure, or 504 (deadline), 503 (no replica), 429 (the queue in front of
                the stage is full).
            asyncio.CancelledError: the client hung up; the request is withdrawn from the stage too.
        """
        with self._telemetry.hop(record, self._stage) as hop:
            remaining_s = (record.deadline_ns - time.monotonic_ns()) / 1e9
            if remaining_s <= 0:
                raise DeadlinePassed(f"the deadline passed before the request was sent to the {self._stage}")
            carrier = self._telemetry.carrier_of(record, hop)
            envelope = Envelope(carrier, record.request_id, remaining_s * 1e3, time.time_ns())
            # The stage enforces the deadline itself and reports where the time went; the grace time lets it reply.
            pending = self._calls.submit(Call(envelope, request), request.cost_us, remaining_s + _GRACE_S)
            try:
                reply: Reply[Result] = await pending.reply
            except TimeoutError:
                raise DeadlinePassed(f"the deadline passed while waiting for the {self._stage}") from None
            finally:
                self._calls.withdraw(pending)
                hop.group_size = pending.group_size
            return self._result(reply, hop)

    def _result(self, reply: Reply[Result], hop: HopRecord) -> Result:
        hop.held_ns, hop.has_reply = reply.held_ns, True
        if reply.failure is not None:
            raise reply.failure.error()
        assert reply.result is not None
        return reply.result

    # --- the shared call ---

    async def _exchange(self, calls: tuple[Any, ...]) -> AsyncIterator[Replies]:
        response: Any = self._handle.remote(calls)
        replies = self._replies(response)
        first = asyncio.ensure_future(anext(replies))
        try:
            await asyncio.wait([first], timeout=self._no_replica_wait_s)
            if not first.done() and not await self._has_replica() and not first.done():
                raise NoReplicaReady(f"no replica of the {self._stage} is ready", retry_after_s=5)
            yield await first
            async for more in replies:
                yield more
        except (asyncio.CancelledError, NoReplicaReady):
            # When a client hangs up, Serve cancels the calls of its request itself, but not this one, which is shared.
            first.cancel()
            response.cancel()
            raise
        except StopAsyncIteration:
            return
        except BackPressureError as error:
            raise QueueFull(
                f"{error.args[0]} requests are waiting for the {self._stage}, the maximum; try again later",
                retry_after_s=1,
            ) from None
        except DeploymentUnavailableError:
            raise NoReplicaReady(f"the {self._stage} failed to deploy", retry_after_s=30) from None
        except (ActorDiedError, ActorUnavailableError, ReplicaUnavailableError):
            raise ReplicaDied(
                f"the {self._stage} replica died while handling this request; try again", retry_after_s=1
            ) from None
        except (RequestCancelledError, TaskCancelledError):
            raise Cancelled(f"the call to the {self._stage} was cancelled") from None

    async def _replies(self, response: Any) -> AsyncIterator[Replies]:
        if self._replies_as_ready:
            async for replies in response:
                yield replies
        else:
            yield tuple(enumerate(await response))

    async def _has_replica(self) -> bool:
        """Whether to keep waiting. True if the controller does not respond: that says nothing about replicas."""
        missing = await self._readiness.missing(_CONTROLLER_TIMEOUT_S)
        return missing is None or self._stage not in missing

    async def _forget(self, call: Call[Request]) -> None:
        """Notify every replica, because Serve does not say which one has the request."""
        response = self._handle.broadcast("forget", (call.envelope.carrier.traceparent,))
        try:
            await response.results_async(return_exceptions=True)
        except Exception as error:
            _logger.warning("an abandoned request could not be withdrawn from the %s: %r", self._stage, error)

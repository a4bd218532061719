"""The client of one stage: calls are awaited like HTTP requests, and failures are raised."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from deployments.errors import DeadlinePassed, QueueFull, ReplicaDied, TooLarge
from deployments.messages import NOBODYS, Call, Carrier, Reply, Share
from deployments.telemetry.names import Service
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import RequestRecord
from deployments.transport import codec
from deployments.transport.connection import Connection, ReplicaLost, SentCall, Turned
from deployments.transport.discovery import Directory
from deployments.transport.frames import MAX_BODY
from deployments.transport.replica_set import ReplicaSet

_GRACE_S = 0.1
"""The stage enforces the deadline itself and reports where the time went; this lets its reply arrive."""
_NO_TRACE = Carrier(f"00-{0:032x}-{0:016x}-00")
_REFUSED_NS = 100_000_000
_RETRY_RESERVE, _RETRIES_PER_CALL = 500.0, 0.1


class StageRequest(Protocol):
    @property
    def work(self) -> int:
        """Compares it with other requests of the stage, see ``messages``."""


Request = TypeVar("Request", bound=StageRequest)
Result = TypeVar("Result")
Chunk = TypeVar("Chunk")


class RetryBudget:
    """How many calls may be sent again: enough that a lost replica is not noticed, too few for a flood of repetitions.

    Every call adds a tenth of a retry, up to a reserve of 500, which is there at the start; a retry takes one.

    If replicas die one after the other, retries add a tenth to the load of the others at most, once the reserve is
    used up.
    """

    def __init__(self, reserve: float = _RETRY_RESERVE, per_call: float = _RETRIES_PER_CALL) -> None:
        self._reserve, self._per_call = reserve, per_call
        self._left = reserve

    def add(self) -> None:
        """Count a call that was sent for the first time."""
        self._left = min(self._reserve, self._left + self._per_call)

    def take(self) -> bool:
        """Take one retry. Returns False if there is none."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Progress(Generic[Chunk]):
    """The chunks of a call that sends parts of its result before the reply.

    Args:
        chunk: type of the chunks.
        take: called with each as it arrives.
    """

    def __init__(self, chunk: type[Chunk], take: Callable[[Chunk], None]) -> None:
        self._decoder: codec.Decoder[Chunk] = codec.Decoder(chunk)
        self._take = take
        self._sent: SentCall | None = None
        self.has_begun = False

    def enough(self, part: int) -> None:
        """Tell the replica that nothing more of a part of the result is needed."""
        if self._sent is not None:
            self._sent.enough(part)

    async def follow(self, sent: SentCall) -> None:
        """Take the chunks of the call, until its reply is there. Raises what the reply would, or DecodeError."""
        self._sent = sent
        async for chunk in sent.chunks():
            self.has_begun = True
            self._take(self._decoder.decode(chunk))


class StageClient(Generic[Request, Result]):
    """Sends requests to one stage.

    Args:
        stage: its name.
        directory: says which replicas it has.
        result: type of its results.
        telemetry: records the hops' spans.
        no_replica_wait_ms: how long a call waits if there is no replica.
    """

    def __init__(
        self,
        stage: Service,
        directory: Directory,
        result: type[Result],
        telemetry: Telemetry,
        no_replica_wait_ms: float,
    ) -> None:
        self._stage, self._telemetry = stage, telemetry
        self.replicas = ReplicaSet(stage, directory, result, no_replica_wait_ms / 1000)
        self._budget = RetryBudget()
        self._refused: dict[str, tuple[int, QueueFull]] = {}
        """By tenant: until when, and why, its requests are refused here."""

    def refuse_early(self, deadline_ns: int, share: Share = NOBODYS) -> None:
        """Refuse a request that no replica would take, or run before its deadline, by what their last replies told.

        Where tenants share the queue, how long it takes as a whole says nothing of one of them: a tenant is refused if
        it was refused by a replica a moment ago.

        Raises QueueFull or DeadlinePassed, as the replica would, before anything is spent on the request.
        """
        wait_ms, left_ms = self.replicas.wait_ms(), (deadline_ns - time.monotonic_ns()) / 1e6
        if share.tenant:
            self._refuse_tenant(share.tenant)
            if not math.isinf(wait_ms):
                return
        if wait_ms <= max(0.0, left_ms):
            return
        if math.isinf(wait_ms):
            raise QueueFull(
                f"the queue of every replica of the {self._stage} is full; try again later",
                retry_after_s=self.replicas.retry_after_s(),
            )
        raise DeadlinePassed(
            f"the deadline would pass in the queue: it passes in {left_ms:.0f} ms, and the shortest queue of the "
            f"{self._stage} takes {wait_ms:.0f} ms",
            retry_after_s=math.ceil((wait_ms - max(0.0, left_ms)) / 1e3),
        )

    def _refuse_tenant(self, tenant: str) -> None:
        refused = self._refused.get(tenant)
        if refused is None:
            return
        until_ns, error = refused
        if time.monotonic_ns() < until_ns:
            raise QueueFull(error.message, retry_after_s=error.retry_after_s)
        del self._refused[tenant]

    async def call(self, record: RequestRecord, request: Request, progress: Progress[Any] | None = None) -> Result:
        """Send ``request`` on behalf of ``record``'s HTTP request, and return the stage's result.

        If the replica is lost before its reply came, the request is sent once more, if the budget allows. Inference
        changes nothing, so it does not matter how far the first replica came, unless part of its result has been
        passed on.

        Args:
            record: of the HTTP request.
            request: what the stage is asked for.
            progress: takes the parts of the result that come before the reply, for stages that send some.

        Raises:
            ApiError: the stage's own failure, or 504 (deadline), 503 (no replica, or replicas died), 413 (too large).
            asyncio.CancelledError: the client hung up; the request is withdrawn from the stage too.
        """
        self._budget.add()
        try:
            return await self._attempt(record, request, 1, progress)
        except ReplicaDied:
            if (progress is not None and progress.has_begun) or not self._budget.take():
                raise
        return await self._attempt(record, request, 2, progress)

    async def _attempt(
        self, record: RequestRecord, request: Request, attempt: int, progress: Progress[Any] | None
    ) -> Result:
        with self._telemetry.hop(record, self._stage, attempt) as hop:
            body = self._encoded(self._telemetry.carrier_of(record, hop), record.request_id, request)

            def left(sent_ns: int) -> None:
                hop.left_ns = sent_ns

            reply = await self._exchange(body, request.work, hop.started_ns, record.deadline_ns, left, progress)
            hop.held_ns, hop.has_reply = reply.held_ns, True
            try:
                return _result(reply)
            except QueueFull as full:
                if record.tenant:
                    self._refused[record.tenant] = time.monotonic_ns() + _REFUSED_NS, full
                raise

    async def post(self, request_id: str, request: Request, deadline_ns: int) -> Result:
        """Send ``request`` on behalf of several HTTP requests, without a span: who asks accounts for the time.

        Raises what ``call`` does.
        """
        self._budget.add()
        body, since_ns = self._encoded(_NO_TRACE, request_id, request), time.monotonic_ns()
        try:
            return _result(await self._exchange(body, request.work, since_ns, deadline_ns))
        except ReplicaDied:
            if not self._budget.take():
                raise
        return _result(await self._exchange(body, request.work, since_ns, deadline_ns))

    def _encoded(self, carrier: Carrier, request_id: str, request: Request) -> bytes:
        body = codec.encode(Call(carrier, request_id, request))
        if len(body) > MAX_BODY:
            raise TooLarge(f"the request makes a message of {len(body)} bytes; at most {MAX_BODY} can be sent")
        return body

    async def _exchange(
        self,
        body: bytes,
        work: int,
        since_ns: int,
        deadline_ns: int,
        left: Callable[[int], None] = lambda _: None,
        progress: Progress[Any] | None = None,
    ) -> Reply[Result]:
        """Send one call, to whichever replica takes it, and return its reply. ``left`` is told when it was sent."""

        def send(connection: Connection) -> SentCall:
            timeout_s = (deadline_ns - time.monotonic_ns()) / 1e9 + _GRACE_S
            return connection.call(body, work, since_ns, deadline_ns, timeout_s)

        while True:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                raise DeadlinePassed(f"the deadline passed before the request was sent to the {self._stage}")
            sent = await self.replicas.send(send, left_s)
            try:
                if progress is not None:
                    await progress.follow(sent)
                return await sent.reply  # type: ignore[no-any-return]
            except Turned:
                continue
            except TimeoutError:
                raise DeadlinePassed(f"the deadline passed while waiting for the {self._stage}") from None
            except ReplicaLost:
                raise ReplicaDied(
                    f"the {self._stage} replica died while handling this request; try again", retry_after_s=1
                ) from None
            finally:
                sent.withdraw()
                left(sent.left_ns)


def _result(reply: Reply[Result]) -> Result:
    if reply.failure is not None:
        raise reply.failure.error()
    result: Any = reply.result
    return result  # type: ignore[no-any-return]

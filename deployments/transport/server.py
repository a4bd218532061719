"""A replica's end of the channel: takes calls from authenticated callers and sends back the replies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from deployments.errors import Failure, InternalError
from deployments.messages import Call, Envelope, Reply
from deployments.transport import codec, handshake
from deployments.transport.frames import (
    MAX_BODY,
    Frame,
    FrameError,
    Kind,
    ReplyFields,
    call_parts,
    counted,
    frame,
    keep_frames,
    keeps,
    pong_frame,
    reply_frame,
)
from deployments.transport.handshake import SINCE_KEEP
from deployments.transport.peer import Peer

STREAM_WINDOW = 64
"""Chunks of one call that may be on their way to its caller; more are sent as the caller takes them."""
_HANDSHAKE_S = 5.0
_LEAVE_S = 5.0
"""How long a caller may take to say that it sends nothing more."""
_CLOSE_S = 1.0
"""How long the last bytes may take to leave."""
_MAX_STRANGERS = 64
"""Connections that have not proved themselves yet; more are closed."""
_LOOK_NS = 500_000
"""How long a look at the queue counts."""
_INTERNAL = Failure.of(InternalError("internal error"))
_logger = logging.getLogger("slowlens.transport")


class Chunks:
    """Sends parts of a result before the reply.

    Attributes:
        on_enough: called with the number of a part of the result of which the caller needs nothing more.
    """

    def __init__(self, caller: _Caller, number: int) -> None:
        self._caller, self._number = caller, number
        self.on_enough: Callable[[int], None] | None = None
        self._credit = STREAM_WINDOW
        self._has_credit: asyncio.Event | None = None

    async def send(self, chunk: Any) -> None:
        """Send one chunk, a message or bytes. Waits while the caller has more than it can take."""
        while self._credit == 0:
            self._has_credit = self._has_credit or asyncio.Event()
            self._has_credit.clear()
            await self._has_credit.wait()
        self._credit -= 1
        self._caller.send(frame(Kind.CHUNK, self._number, codec.encode(chunk)))

    def grant(self, chunks: int) -> None:
        self._credit += chunks
        if self._has_credit is not None:
            self._has_credit.set()


Handler = Callable[[Envelope, Any, Chunks], Reply[Any] | Coroutine[Any, Any, Reply[Any]]]
"""Handles one call: what came with it, the request, and where parts of the result can be sent.

Returns the reply, or, if that takes a while, a coroutine, which is cancelled if the caller no longer wants the reply.
"""


class QueueState(NamedTuple):
    """What a stage tells of its queue."""

    wait_ms: float = 0.0
    """How long a call that arrived now would wait."""
    is_full: bool = False
    """Whether it would be refused."""
    is_stuck: bool = False
    """Whether the device has been busy with one run for far too long."""


class ChannelServer:
    """Listens for callers.

    Args:
        handler: handles each call.
        request: the type of the requests.
        secret: what callers have to prove that they know.
        max_ongoing_requests: calls taken at once; further ones are sent back, for another replica.
        queue: looks at the stage's queue; told to callers with every reply, and when they ask.
        versions: of the protocol.
    """

    def __init__(
        self,
        handler: Handler,
        request: type[Any],
        secret: str,
        max_ongoing_requests: int,
        queue: Callable[[], QueueState] = QueueState,
        versions: tuple[int, ...] = handshake.VERSIONS,
    ) -> None:
        self.handle, self.secret, self.versions = handler, secret, versions
        self.max_ongoing_requests = max_ongoing_requests
        self.decoder: codec.Decoder[Call[Any]] = codec.Decoder(Call[request])  # type: ignore[valid-type]
        self.is_leaving = False
        self.on_keep: Callable[[list[tuple[int, bool]]], None] = lambda _: None
        """Called with the traces that a caller keeps."""
        self.work = self.ongoing = 0
        self._queue = queue
        self._seen, self._looked_ns = QueueState(), -_LOOK_NS - 1
        self._server: asyncio.Server | None = None
        self._callers: set[_Caller] = set()
        self._turned_away: set[_Caller] = set()
        self._changed = asyncio.Event()

    async def listen(self, host: str, first_port: int, last_port: int) -> int:
        """Listen on the first free port of the range, and return it. Raises OSError if none is free."""
        loop = asyncio.get_running_loop()
        problem: OSError | None = None
        for port in range(first_port, last_port + 1):
            try:
                self._server = await loop.create_server(lambda: _Caller(self), host, port, backlog=512)
            except OSError as error:
                problem = error
            else:
                bound: int = self._server.sockets[0].getsockname()[1]
                return bound
        raise OSError(f"no port from {first_port} to {last_port} can be listened on at {host}: {problem}")

    async def drain(self) -> None:
        """Tell the callers to send nothing more, and return when no call is left and none can come."""
        self.is_leaving = True
        if self._server is not None:
            self._server.close()
        for caller in self._callers:
            caller.leave()
        # A caller that hangs must not keep the replica for as long as a call may take.
        await self._until(lambda: not any(caller.may_call for caller in self._callers), _LEAVE_S)
        await self._until(lambda: not self.ongoing)

    async def close(self) -> None:
        """End all connections, and return when they have ended; calls that are still here are cancelled."""
        if self._server is not None:
            self._server.close()
        for caller in tuple(self._callers):
            caller.close()
        await self._until(lambda: not self._callers, _CLOSE_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()

    def keep(self, kept: Sequence[tuple[int, bool]]) -> None:
        """Tell all callers which traces are kept, and whether each is for its own sake."""
        for each in keep_frames(kept):
            for caller in self._callers:
                caller.keep(each)

    @property
    def callers(self) -> int:
        """Connections of callers that have proved themselves."""
        return sum(caller.is_known for caller in self._callers)

    # --- for the callers' connections ---

    def may_join(self) -> bool:
        return sum(not caller.is_known for caller in self._callers) < _MAX_STRANGERS

    def join(self, caller: _Caller) -> None:
        self._callers.add(caller)

    def part(self, caller: _Caller) -> None:
        self._callers.discard(caller)
        self._turned_away.discard(caller)
        self._changed.set()

    def takes(self, caller: _Caller) -> bool:
        """Whether a call of this caller can be taken. If not, it is told when one can."""
        if self.ongoing < self.max_ongoing_requests:
            return True
        self._turned_away.add(caller)
        return False

    def begun(self, work: int) -> None:
        self.ongoing += 1
        self.work += work

    def ended(self, work: int) -> None:
        self.ongoing -= 1
        self.work -= work
        if self._turned_away:
            for caller in self._turned_away:
                caller.send(frame(Kind.ROOM))
            self._turned_away.clear()
        if self.is_leaving:
            self._changed.set()

    def state(self) -> ReplyFields:
        """What a reply that leaves now tells. The replies of a batch leave together, so its queue is looked at once."""
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns > _LOOK_NS:
            self._seen, self._looked_ns = self._queue(), now_ns
        return ReplyFields(self.work, int(self._seen.wait_ms), self._seen.is_full, self._seen.is_stuck)

    def changed(self) -> None:
        self._changed.set()


class _Caller(Peer):
    """The connection of one caller."""

    def __init__(self, server: ChannelServer) -> None:
        super().__init__()
        self._server = server
        self._handshake = handshake.Replica(server.secret, server.versions)
        self._timeout: asyncio.TimerHandle | None = None
        self._ongoing: dict[int, asyncio.Task[Reply[Any]]] = {}
        self._unwanted: set[int] = set()
        self._streams: dict[int, Chunks] = {}
        self._has_left = False
        self.is_known = False

    @property
    def may_call(self) -> bool:
        """Whether a call of this caller may be on its way."""
        return self.is_known and not self._has_left

    def opened(self) -> None:
        if not self._server.may_join():
            self.abort("too many connections that have not proved themselves")
            return
        self._server.join(self)
        self._timeout = self._loop.call_later(_HANDSHAKE_S, self.abort, "the handshake was not finished")

    def keep(self, told: bytes) -> None:
        if self.is_known and self._handshake.version >= SINCE_KEEP:
            self.send(told)

    def leave(self) -> None:
        if self.is_known:
            self.send(frame(Kind.LEAVING))
        else:
            self.close()

    def lost(self, reason: str) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
        for task in self._ongoing.values():
            task.cancel()
        if self._ongoing:
            _logger.warning("a caller with %d calls in progress is gone: %s", len(self._ongoing), reason)
        self._server.part(self)

    def received(self, frame: Frame) -> None:
        if not self.is_known:
            self._shake_hands(frame)
        elif frame.kind == Kind.CALL:
            self._take(frame)
        elif frame.kind == Kind.CANCEL:
            self._cancel(frame.number)
        elif frame.kind == Kind.GRANT:
            if frame.number in self._streams:
                self._streams[frame.number].grant(counted(frame.payload))
        elif frame.kind == Kind.ENOUGH:
            chunks = self._streams.get(frame.number)
            if chunks is not None and chunks.on_enough is not None:
                chunks.on_enough(counted(frame.payload))
        elif frame.kind == Kind.LEFT:
            self._has_left = True
            self._server.changed()
        elif frame.kind == Kind.KEEP:
            self._server.on_keep(keeps(frame.payload))
        elif frame.kind == Kind.PING:
            self.send(lambda: pong_frame(self._server.state()))
        else:
            raise FrameError(f"a caller sent a frame of kind {frame.kind}")

    def _shake_hands(self, received: Frame) -> None:
        try:
            if received.kind == Kind.HELLO:
                self.send(frame(Kind.CHALLENGE, payload=self._handshake.challenge(received.payload)))
            elif received.kind == Kind.PROOF:
                self._handshake.check(received.payload)
                self._welcome()
            else:
                raise handshake.HandshakeError("the connection does not begin with a handshake")
        except handshake.HandshakeError as error:
            _logger.warning("a connection was refused: %s", error)
            self.send(frame(Kind.REFUSED, payload=str(error).encode()))
            self.close()

    def _welcome(self) -> None:
        self.is_known = True
        self.trust()
        if self._timeout is not None:
            self._timeout.cancel()
        self.send(frame(Kind.WELCOME, payload=handshake.welcome(self._server.max_ongoing_requests)))
        if self._server.is_leaving:
            self.leave()

    # --- the path of a call ---

    def _take(self, received: Frame) -> None:
        arrived_ns, number = time.monotonic_ns(), received.number
        if number in self._ongoing:
            raise FrameError(f"a caller used the number {number} twice")
        if not self._server.takes(self):
            self.send(frame(Kind.BUSY, number))
            return
        fields, body = call_parts(received.payload)
        try:
            call: Call[Any] = self._server.decoder.decode(body)
        except codec.DecodeError as error:
            _logger.error("a call is not a message of the schema: %s", error)
            self._send_reply(number, codec.encode(Reply(0, failure=_INTERNAL)))
            return
        envelope = Envelope(
            call.carrier,
            call.request_id,
            arrived_ns,
            arrived_ns + fields.remaining_us * 1000,
            fields.waited_us * 1000,
        )
        work, chunks = call.request.work, Chunks(self, number)
        self._server.begun(work)
        try:
            handled = self._server.handle(envelope, call.request, chunks)
        except Exception as error:
            handled = _failed(error, envelope)
        if isinstance(handled, Reply):
            self._server.ended(work)
            self._reply(number, envelope, handled)
            return
        self._streams[number] = chunks
        self._ongoing[number] = task = self._loop.create_task(handled)
        task.add_done_callback(lambda task: self._finish(task, number, work, envelope))

    def _cancel(self, number: int) -> None:
        if number in self._ongoing:
            self._unwanted.add(number)
            self._ongoing[number].cancel()

    def _finish(self, task: asyncio.Task[Reply[Any]], number: int, work: int, envelope: Envelope) -> None:
        del self._ongoing[number], self._streams[number]
        self._server.ended(work)
        if number in self._unwanted:
            self._unwanted.discard(number)
        elif not self.is_lost:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            self._reply(number, envelope, task.result() if error is None else _failed(error, envelope))

    def _reply(self, number: int, envelope: Envelope, reply: Reply[Any]) -> None:
        try:
            body = codec.encode(reply)
            if len(body) > MAX_BODY:
                raise ValueError(f"it has {len(body)} bytes; at most {MAX_BODY} can be sent")
        except Exception:
            _logger.exception("the result of request %s cannot be sent", envelope.request_id)
            body = codec.encode(Reply(reply.held_ns, failure=_INTERNAL))
        self._send_reply(number, body)

    def _send_reply(self, number: int, body: bytes) -> None:
        # What the replica has to do is told as it is when the reply leaves.
        self.send(lambda: reply_frame(number, self._server.state(), body))


def _failed(error: BaseException, envelope: Envelope) -> Reply[Any]:
    _logger.error("a call of request %s failed", envelope.request_id, exc_info=error)
    return Reply(time.monotonic_ns() - envelope.arrived_ns, failure=_INTERNAL)

"""A caller's end of the channel: one connection to one replica, and the calls that are on it."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from deployments.transport import codec, handshake
from deployments.transport.frames import (
    CallFields,
    Frame,
    FrameError,
    Kind,
    ReplyFields,
    call_frame,
    enough_frame,
    frame,
    grant_frame,
    keep_frames,
    keeps,
    reply_parts,
)
from deployments.transport.handshake import SINCE_KEEP
from deployments.transport.peer import PING_S, Peer

_MAX_NUMBER = 2**32 - 1
_GRANT_AT = 16
"""Chunks taken before the replica is told so."""
_FULL_S = 0.3
"""How long it counts that a replica was full: replies and answers to pings tell anew."""
_SILENT_S, _STUCK_S = 1.0, 1.0
"""How long nothing may be heard of a replica that has calls, and how long it counts that it was stuck."""
LINGER_S = 0.5
"""How long the connection to a replica that leaves stays after the last reply."""
_END = object()
_CHANCE = random.Random()


class Candidate(Protocol):
    """A replica as a caller sees it."""

    @property
    def has_room(self) -> bool: ...
    def hangs(self, now_s: float) -> bool: ...
    def work(self, now_s: float) -> float: ...


Chosen = TypeVar("Chosen", bound=Candidate)


def least_work(replicas: Sequence[Chosen], now_s: float, chance: random.Random = _CHANCE) -> Chosen | None:
    """Return the replica with the least work of those that have room, any of several; None if there is none.

    One that hangs is chosen only if there is no other.
    """
    best, least = None, (True, float("inf"))
    for replica in chance.sample(replicas, len(replicas)):
        if replica.has_room and (rank := (replica.hangs(now_s), replica.work(now_s))) < least:
            best, least = replica, rank
    return best


class ConnectionRefused(Exception):
    """The replica does not take this caller, or is not the replica that it should be."""


class ReplicaLost(Exception):
    """The connection ended before the reply came. The message says why."""


class Turned(Exception):
    """The replica did not take the call, because it has as many as it may."""


class SentCall:
    """A call on its way: awaited with ``reply``.

    Attributes:
        reply: resolves to the ``Reply``. Raises ReplicaLost, Turned, TimeoutError, or DecodeError if it is not of the
            schema.
        left_ns: when its frame left, by the monotonic clock; 0 if it has not.
    """

    __slots__ = (
        "_chunks",
        "_connection",
        "_expires_s",
        "_timer",
        "deadline_ns",
        "left_ns",
        "number",
        "reply",
        "since_ns",
        "work",
    )

    def __init__(
        self, connection: Connection, number: int, work: int, since_ns: int, deadline_ns: int, timeout_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        self._connection, self.number, self.work = connection, number, work
        self.since_ns, self.deadline_ns = since_ns, deadline_ns
        self.left_ns = 0
        self.reply: asyncio.Future[Any] = loop.create_future()
        self._chunks: asyncio.Queue[Any] | None = None
        self._expires_s = loop.time() + timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self.watch(loop)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the timer that ends the call, if that is soon. A timer costs more than all else that is done here."""
        if self._timer is None and self._expires_s - loop.time() < 2 * PING_S:
            self._timer = loop.call_at(self._expires_s, self.end, TimeoutError())

    def withdraw(self) -> None:
        """Must be called when the reply is no longer awaited, whether it came or not."""
        if self._timer is not None:
            self._timer.cancel()
        self._connection.withdraw(self)
        if not self.reply.done():
            self.reply.cancel()

    def enough(self, part: int) -> None:
        """Tell the replica that nothing more of a part of the result is needed."""
        self._connection.enough(self, part)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the encoded chunks as they come, until the reply does. Raises what ``reply`` raises."""
        taken = 0
        queue = self._queue()
        while (chunk := await queue.get()) is not _END:
            yield chunk
            taken += 1
            if taken == _GRANT_AT:
                self._connection.grant(self, taken)
                taken = 0
        if self.reply.exception() is not None:
            raise self.reply.exception()  # type: ignore[misc]

    def add_chunk(self, chunk: bytes) -> None:
        self._queue().put_nowait(chunk)

    def end(self, outcome: Any) -> None:
        """Set the reply, or the exception in its place, unless there is one."""
        if self.reply.done():
            return
        if isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
            # A caller that is no longer there does not ask for it.
            self.reply.exception()
        else:
            self.reply.set_result(outcome)
        if self._chunks is not None:
            self._chunks.put_nowait(_END)

    def _queue(self) -> asyncio.Queue[Any]:
        if self._chunks is None:
            self._chunks = asyncio.Queue()
            if self.reply.done():
                self._chunks.put_nowait(_END)
        return self._chunks


class Connection(Peer):
    """The connection to one replica.

    Args:
        secret: what the replica and this caller prove to each other that they know.
        decoder: decodes replies.
        on_keep: called with the traces that the replica keeps.
        changed: called when calls may be sent that could not before, when the connection has ended, and again and again
            while nothing is heard of the replica.

    Attributes:
        ready: done when the handshake is; raises ConnectionRefused or ReplicaLost.
    """

    def __init__(
        self,
        secret: str,
        decoder: codec.Decoder[Any],
        changed: Callable[[], None],
        versions: tuple[int, ...] = handshake.VERSIONS,
        on_keep: Callable[[list[tuple[int, bool]]], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._handshake = handshake.Caller(secret, versions)
        self._decoder, self._changed, self._on_keep = decoder, changed, on_keep
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._is_proven = False
        self._calls: dict[int, SentCall] = {}
        self._numbers = itertools.count(1)
        self._max_ongoing = 0
        self._is_busy = False
        self.is_leaving = False
        self._own_work = self._others_work = 0
        self._told, self._told_s = ReplyFields(0, 0), 0.0
        self._has_sent = False
        self._heard_s = self._watch_due_s = 0.0
        self._watch_timer: asyncio.TimerHandle | None = None
        self.why_lost = ""

    # --- what a caller chooses by ---

    @property
    def ongoing(self) -> int:
        return len(self._calls)

    @property
    def has_room(self) -> bool:
        """Whether a call can be sent now."""
        return not self.is_lost and not self.is_leaving and not self._is_busy and len(self._calls) < self._max_ongoing

    def work(self, now_s: float) -> float:
        """What the replica has to do: calls of this caller, and of others as it last said; that is forgotten soon."""
        age_s = now_s - self._told_s
        return self._own_work + (self._others_work * max(0.0, 1 - age_s) if self._others_work else 0)

    def wait_ms(self, now_s: float) -> float:
        """How long a call would wait for the device, by what the replica last said and the time since."""
        return max(0.0, self._told.wait_ms - (now_s - self._told_s) * 1e3)

    def is_full(self, now_s: float) -> bool:
        """Whether the replica said a moment ago that it refuses calls."""
        return self._told.is_full and now_s - self._told_s < _FULL_S

    def silent_s(self, now_s: float) -> float:
        """How long nothing has been heard of the replica although it has calls; pings ask for an answer meanwhile."""
        return now_s - self._heard_s if self._calls else 0.0

    def hangs(self, now_s: float) -> bool:
        """Whether calls should rather go to another replica: this one is silent, or its device is stuck."""
        is_stuck = self._told.is_stuck and now_s - self._told_s < _STUCK_S
        return is_stuck or self.silent_s(now_s) > _SILENT_S

    # --- calls ---

    def call(self, body: bytes, work: int, since_ns: int, deadline_ns: int, timeout_s: float) -> SentCall:
        """Send a call. The caller must ``withdraw`` it in the end.

        Args:
            body: the encoded ``messages.Call``.
            work: of the request.
            since_ns: when the call began to wait for a replica, by the monotonic clock.
            deadline_ns: until when the stage may work on it; counted from when the frame leaves.
            timeout_s: how long to wait for the reply.
        """
        number = next(self._numbers) & _MAX_NUMBER
        sent = SentCall(self, number, work, since_ns, deadline_ns, timeout_s)
        self._calls[number] = sent
        self._own_work += work
        self.send(lambda: self._departure(sent, body), is_alone=len(self._calls) == 1)
        if self._watch_timer is None:
            self._heard_s = self._loop.time()
            self._watch_again(self._heard_s)
        return sent

    def _departure(self, sent: SentCall, body: bytes) -> bytes | None:
        if sent.number not in self._calls:
            return None
        now_ns = sent.left_ns = time.monotonic_ns()
        fields = CallFields((sent.deadline_ns - now_ns) // 1000, (now_ns - sent.since_ns) // 1000)
        self._has_sent = True
        return call_frame(sent.number, fields, body)

    def withdraw(self, sent: SentCall) -> None:
        """The call has its reply, or is no longer wanted; then the replica is told if it has the call."""
        if self._forget(sent.number) is not None and sent.left_ns and not self.is_lost:
            self.send(frame(Kind.CANCEL, sent.number))

    def grant(self, sent: SentCall, chunks: int) -> None:
        if sent.number in self._calls:
            self.send(grant_frame(sent.number, chunks))

    def enough(self, sent: SentCall, part: int) -> None:
        if sent.number in self._calls:
            self.send(enough_frame(sent.number, part))

    def keep(self, kept: Sequence[tuple[int, bool]]) -> None:
        """Tell the replica which traces are kept, and whether each is for its own sake."""
        if self.ready.done() and not self.is_lost and self._handshake.version >= SINCE_KEEP:
            for each in keep_frames(kept):
                self.send(each)

    def _forget(self, number: int) -> SentCall | None:
        sent = self._calls.pop(number, None)
        if sent is None:
            return None
        self._own_work -= sent.work
        if self.is_leaving and not self._calls:
            self._close_soon()
        elif not self._is_busy and len(self._calls) == self._max_ongoing - 1:
            self._loop.call_soon(self._changed)
        return sent

    def _watch(self) -> None:
        """Four times a second while there are calls: see to those that expire soon, and that the replica answers."""
        self._watch_timer = None
        if not self._calls or self.is_lost:
            return
        for sent in tuple(self._calls.values()):
            sent.watch(self._loop)
        now_s = self._loop.time()
        if now_s > self._watch_due_s + PING_S:
            # This process was held up itself, and what has come meanwhile may not have been read yet.
            self._heard_s = now_s
        silent_s = self.silent_s(now_s)
        if not self._has_sent or silent_s > PING_S:
            self.send(frame(Kind.PING))
        self._has_sent = False
        if silent_s > _SILENT_S:
            self._changed()
            if self.is_lost:
                return
        self._watch_again(now_s)

    def _watch_again(self, now_s: float) -> None:
        self._watch_due_s = now_s + PING_S
        self._watch_timer = self._loop.call_at(self._watch_due_s, self._watch)

    # --- Peer ---

    def opened(self) -> None:
        self.send(frame(Kind.HELLO, payload=self._handshake.hello()))

    def received(self, frame: Frame) -> None:
        if not self.ready.done():
            self._shake_hands(frame)
            return
        kind = frame.kind
        self._heard_s = self._loop.time()
        if kind == Kind.REPLY:
            self._take_reply(frame)
        elif kind == Kind.CHUNK:
            if frame.number in self._calls:
                self._calls[frame.number].add_chunk(bytes(frame.payload))
        elif kind == Kind.BUSY:
            self._is_busy = True
            self._conclude(frame.number, Turned())
        elif kind == Kind.ROOM:
            self._is_busy = False
            self._changed()
        elif kind == Kind.LEAVING:
            self.leave()
        elif kind == Kind.KEEP:
            self._on_keep(keeps(frame.payload))
        elif kind == Kind.PONG:
            self._hear(reply_parts(frame.payload)[0])
        else:
            raise FrameError(f"a replica sent a frame of kind {kind}")

    def leave(self) -> None:
        """Send nothing more; the connection ends when it has no call."""
        if self.is_leaving or self.is_lost:
            return
        self.is_leaving = True
        self.send(frame(Kind.LEFT))
        if not self._calls:
            self._close_soon()

    def _close_soon(self) -> None:
        """Which traces of the last calls are kept is known a moment after their replies."""
        self._loop.call_later(LINGER_S, self.close)

    def lost(self, reason: str) -> None:
        self.why_lost = reason
        if not self.ready.done():
            self.ready.set_exception(ReplicaLost(reason))
            self.ready.exception()
        calls, self._calls = self._calls, {}
        self._own_work = 0
        for sent in calls.values():
            sent.end(ReplicaLost(reason))
        self._changed()

    # --- inside ---

    def _shake_hands(self, received: Frame) -> None:
        try:
            if received.kind == Kind.CHALLENGE:
                self.send(frame(Kind.PROOF, payload=self._handshake.proof(received.payload)))
                self._is_proven = True
            elif received.kind == Kind.WELCOME and self._is_proven:
                self._max_ongoing = handshake.parse_welcome(received.payload).max_ongoing_requests
                self.trust()
                self.ready.set_result(None)
            elif received.kind == Kind.REFUSED:
                raise handshake.HandshakeError(bytes(received.payload).decode(errors="replace"))
            else:
                raise handshake.HandshakeError("the other end does not speak this protocol")
        except handshake.HandshakeError as error:
            self.ready.set_exception(ConnectionRefused(str(error)))
            self.ready.exception()
            self.abort(str(error))

    def _take_reply(self, received: Frame) -> None:
        fields, body = reply_parts(received.payload)
        if received.number in self._calls:
            try:
                outcome = self._decoder.decode(body)
            except codec.DecodeError as error:
                outcome = error
            self._conclude(received.number, outcome)
        self._hear(fields)

    def _hear(self, fields: ReplyFields) -> None:
        self._told_s, self._told = self._loop.time(), fields
        self._others_work = max(0, fields.work - self._own_work)

    def _conclude(self, number: int, outcome: Any) -> None:
        sent = self._forget(number)
        if sent is not None:
            sent.end(outcome)

"""One end of a connection: frames in, frames out, in plain asyncio."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from deployments.transport.frames import MAX_HANDSHAKE_PAYLOAD, MAX_PAYLOAD, Frame, FrameError, FrameReader

UNREAD_S = 10.0
"""How long a peer may leave what was sent to it unread before the connection is given up."""
PING_S = 0.25
"""A peer that waits for an answer sends something at least this often, see ``_notice_lost_nodes``."""
_UNACKNOWLEDGED_MS, _IDLE_S = 750, 1
Departure = Callable[[], bytes | None]
"""Makes a frame when it leaves; None if it is no longer wanted."""


class Peer(asyncio.Protocol):
    """Sends frames together where there are several: a system call costs more than a frame.

    Frames that are sent while received ones are handled leave when all of those are; others at the end of this tick of
    the event loop, or at once if no more will come (``is_alone``). While the other end does not read, frames wait here,
    those that are no longer wanted drop out, and nothing more is read from it; after ``UNREAD_S`` the connection is
    given up.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(MAX_HANDSHAKE_PAYLOAD)
        self._outbox: deque[bytes | Departure] = deque()
        self._is_blocked = self._will_flush = False
        self._unread_timer: asyncio.TimerHandle | None = None
        self.is_lost = False

    # --- for subclasses ---

    def opened(self) -> None:
        """Called once, when the connection stands."""

    def received(self, frame: Frame) -> None:
        """Called for every frame. May raise FrameError, which ends the connection."""
        raise NotImplementedError

    def lost(self, reason: str) -> None:
        """Called once, when the connection has ended."""

    def send(self, frame: bytes | Departure, *, is_alone: bool = False) -> None:
        """Send a frame, or what a departure makes when it leaves."""
        self._outbox.append(frame)
        if self._will_flush or self._is_blocked:
            return
        if is_alone:
            self._flush()
        else:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def trust(self) -> None:
        """The peer has proved itself: from now on its frames may be long."""
        self._reader.max_payload = MAX_PAYLOAD

    def close(self) -> None:
        """Send what is waiting, then end the connection."""
        if self._transport is not None and not self.is_lost:
            self._flush()
            self._transport.close()

    def abort(self, reason: str) -> None:
        """End the connection now."""
        if not self.is_lost:
            self._end(reason)
            if self._transport is not None:
                self._transport.abort()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _notice_lost_nodes(transport.get_extra_info("socket"))
        self.opened()

    def data_received(self, data: bytes) -> None:
        was_flushing, self._will_flush = self._will_flush, True
        try:
            for frame in self._reader.feed(data):
                if self.is_lost:
                    return
                self.received(frame)
        except FrameError as error:
            self.abort(str(error))
        if not was_flushing and not self.is_lost:
            self._flush()

    def pause_writing(self) -> None:
        self._is_blocked = True
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()
        self._unread_timer = self._loop.call_later(
            UNREAD_S, self.abort, f"the peer has left what was sent to it unread for {UNREAD_S:g} s"
        )

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._stop_timer()
        if self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"the connection was lost: {error}" if error else "the connection was closed by the peer")

    # --- inside ---

    def _flush(self) -> None:
        self._will_flush = False
        if self.is_lost or self._transport is None:
            return
        parts = []
        while self._outbox and not self._is_blocked:
            waiting = self._outbox.popleft()
            part = waiting if isinstance(waiting, bytes) else waiting()
            if part is not None:
                parts.append(part)
        if parts:
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def _end(self, reason: str) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        self._stop_timer()
        self._outbox.clear()
        self.lost(reason)

    def _stop_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None


def _notice_lost_nodes(connection: socket.socket | None) -> None:
    """Let the kernel end the connection if the other node is lost.

    A process that dies closes its connections; a node that is lost does not. What is sent to it stays unacknowledged,
    though, while the kernel of a node that is there acknowledges also for a process that hangs.
    """
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": _IDLE_S, "TCP_KEEPINTVL": _IDLE_S, "TCP_KEEPCNT": 1}
    options |= {"TCP_USER_TIMEOUT": _UNACKNOWLEDGED_MS}
    for name, value in options.items():
        # Linux has them all; elsewhere those that exist are set.
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

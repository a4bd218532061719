"""Frames: the units in which two actors exchange messages over one TCP connection. Pure functions of bytes.

A frame is a header of 9 bytes, ``length`` of what follows it (u32), ``kind`` (u8) and ``number`` (u32), then a payload
of ``length`` bytes; all integers are big-endian. ``number`` identifies the call that the frame belongs to, 0 if none.
The payload of some kinds begins with fields of fixed size, which are written when the frame leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

MAX_PAYLOAD = 64 * 1024 * 1024
"""Of a frame between peers that know each other."""
MAX_BODY = MAX_PAYLOAD - 64
"""Of a message: the rest is left for the fields that are written when the frame leaves."""
MAX_HANDSHAKE_PAYLOAD = 1024
"""Of a frame before the peer has proved that it knows the secret."""
_HEADER = struct.Struct("!IBI")
_CALL = struct.Struct("!QQ")
_REPLY = struct.Struct("!IIB")
_COUNT = struct.Struct("!I")
_KEEP = struct.Struct("!16sB")
_KEEPS_AT_ONCE = 1000
_MAX_U32, _MAX_U64 = 2**32 - 1, 2**64 - 1


class Kind(IntEnum):
    # The handshake, in this order.
    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    """Instead of CHALLENGE or WELCOME: why there will be no connection, as text."""
    # From the caller.
    CALL = 16
    CANCEL = 17
    """The call is no longer wanted."""
    GRANT = 18
    """The caller can take this many more chunks of the call."""
    LEFT = 19
    """Answer to LEAVING: no call follows."""
    PING = 20
    """Asks for a PONG. (A lost node is noticed before, because its kernel does not acknowledge it.)"""
    ENOUGH = 21
    """The caller needs nothing more of one part of a call, whose number follows."""
    KEEP = 22
    """The caller keeps the traces that follow. From version 2 on, in both directions."""
    # From the replica.
    REPLY = 32
    CHUNK = 33
    """Part of the result, before the reply."""
    BUSY = 34
    """The replica did not take the call, because it has as many as it may."""
    ROOM = 35
    """The replica can take calls again."""
    LEAVING = 36
    """The replica takes no new call, and finishes those that it has."""
    PONG = 37
    """Answer to PING: what a reply tells."""


class FrameError(Exception):
    """The peer sent something that is not a frame, or one that is too long."""


class Frame(NamedTuple):
    kind: int
    number: int
    payload: memoryview


class CallFields(NamedTuple):
    remaining_us: int
    """Until the deadline, when the frame left."""
    waited_us: int
    """From the call's beginning until the frame left."""


class ReplyFields(NamedTuple):
    work: int
    """Of all calls that the replica has now, see ``messages``."""
    wait_ms: int
    """How long a call that arrived now would wait for the device."""
    is_full: bool = False
    """Whether a call that arrived now would be refused."""
    is_stuck: bool = False
    """Whether the device has been busy with one run for far too long."""


def frame(kind: Kind, number: int = 0, payload: bytes = b"") -> bytes:
    return _HEADER.pack(len(payload), kind, number) + payload


def call_frame(number: int, fields: CallFields, body: bytes) -> bytes:
    remaining_us = min(max(0, fields.remaining_us), _MAX_U64)
    waited_us = min(max(0, fields.waited_us), _MAX_U64)
    return _HEADER.pack(_CALL.size + len(body), Kind.CALL, number) + _CALL.pack(remaining_us, waited_us) + body


def reply_frame(number: int, fields: ReplyFields, body: bytes) -> bytes:
    return _HEADER.pack(_REPLY.size + len(body), Kind.REPLY, number) + _packed(fields) + body


def pong_frame(fields: ReplyFields) -> bytes:
    return _HEADER.pack(_REPLY.size, Kind.PONG, 0) + _packed(fields)


def _packed(fields: ReplyFields) -> bytes:
    flags = fields.is_full | fields.is_stuck << 1
    return _REPLY.pack(min(fields.work, _MAX_U32), min(fields.wait_ms, _MAX_U32), flags)


def grant_frame(number: int, chunks: int) -> bytes:
    return _HEADER.pack(_COUNT.size, Kind.GRANT, number) + _COUNT.pack(chunks)


def enough_frame(number: int, part: int) -> bytes:
    return _HEADER.pack(_COUNT.size, Kind.ENOUGH, number) + _COUNT.pack(part)


def keep_frames(kept: Iterable[tuple[int, bool]]) -> Iterator[bytes]:
    """Frames that tell of traces that are kept: their ids, and whether each is for its own sake."""
    entries = [_KEEP.pack(trace_id.to_bytes(16), is_cause) for trace_id, is_cause in kept]
    for begin in range(0, len(entries), _KEEPS_AT_ONCE):
        yield frame(Kind.KEEP, 0, b"".join(entries[begin : begin + _KEEPS_AT_ONCE]))


def keeps(payload: memoryview) -> list[tuple[int, bool]]:
    if len(payload) % _KEEP.size:
        raise FrameError(f"a payload of {len(payload)} bytes is no list of traces")
    return [(int.from_bytes(trace_id), bool(is_cause)) for trace_id, is_cause in _KEEP.iter_unpack(payload)]


def call_parts(payload: memoryview) -> tuple[CallFields, memoryview]:
    return CallFields(*_fields(_CALL, payload)), payload[_CALL.size :]


def reply_parts(payload: memoryview) -> tuple[ReplyFields, memoryview]:
    work, wait_ms, flags = _fields(_REPLY, payload)
    return ReplyFields(work, wait_ms, bool(flags & 1), bool(flags & 2)), payload[_REPLY.size :]


def counted(payload: memoryview) -> int:
    return int(_fields(_COUNT, payload)[0])


def _fields(fields: struct.Struct, payload: memoryview) -> tuple[int, ...]:
    if len(payload) < fields.size:
        raise FrameError(f"a payload of {len(payload)} bytes is too short for its kind")
    return fields.unpack_from(payload)


class FrameReader:
    """Cuts a stream of bytes into frames, however the bytes are split.

    Args:
        max_payload: a longer frame raises FrameError before its payload is read. May be set while reading.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self.max_payload = max_payload
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._needed = _HEADER.size

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete with ``data``. Raises FrameError."""
        if self._pending_size:
            # Joined only when a frame is complete: a long one arrives in many parts.
            self._pending.append(data)
            self._pending_size += len(data)
            if self._pending_size < self._needed:
                return
            data = b"".join(self._pending)
            self._pending.clear()
            self._pending_size = 0
        view, position, end = memoryview(data), 0, len(data)
        self._needed = _HEADER.size
        while end - position >= _HEADER.size:
            length, kind, number = _HEADER.unpack_from(data, position)
            if length > self.max_payload:
                raise FrameError(f"a frame announces {length} bytes; at most {self.max_payload} are allowed")
            begin = position + _HEADER.size
            if end - begin < length:
                self._needed = _HEADER.size + length
                break
            position = begin + length
            yield Frame(kind, number, view[begin:position])
        if position < end:
            self._pending.append(data[position:])
            self._pending_size = end - position

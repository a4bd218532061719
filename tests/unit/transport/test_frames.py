"""Frames from any split of bytes, and hostile ones; messages that survive the wire, and bytes that are none."""

from __future__ import annotations

import contextlib
import struct
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import Failure, QueueFull
from deployments.messages import (
    Call,
    Carrier,
    OutputOptions,
    PostprocessRequest,
    Predicted,
    PredictRequest,
    Ragged,
    Reply,
    Tokenized,
    TokenizeRequest,
)
from deployments.transport import codec
from deployments.transport.frames import (
    CallFields,
    FrameError,
    FrameReader,
    Kind,
    ReplyFields,
    call_frame,
    call_parts,
    counted,
    frame,
    grant_frame,
    pong_frame,
    reply_frame,
    reply_parts,
)

FRAMES = st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=200))
CARRIER = Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "vendor=1")


@given(st.lists(FRAMES, max_size=12), st.data())
def test_frames_are_the_same_however_the_bytes_are_split(
    sent: list[tuple[Kind, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frame(*one) for one in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
    reader, found = FrameReader(), []
    for begin, end in pairwise([0, *cuts, len(stream)]):
        found += [(one.kind, one.number, bytes(one.payload)) for one in reader.feed(stream[begin:end])]

    assert found == sent


@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_a_frame_error(stream: bytes) -> None:
    reader = FrameReader(max_payload=1000)
    try:
        for one in reader.feed(stream):
            assert len(one.payload) <= 1000
    except FrameError:
        pass


@given(st.integers(101, 2**32 - 1), st.integers(0, 8))
def test_a_frame_that_is_too_long_is_refused_before_its_payload_is_there(length: int, cut: int) -> None:
    header = struct.pack("!IBI", length, Kind.CALL, 1)
    reader = FrameReader(max_payload=100)
    assert list(reader.feed(header[:cut])) == []
    with pytest.raises(FrameError, match=f"announces {length} bytes"):
        list(reader.feed(header[cut:]))


def test_a_long_frame_in_many_parts_is_joined_once() -> None:
    payload = bytes(range(256)) * 4096
    stream = frame(Kind.REPLY, 7, payload)
    reader, found = FrameReader(), []
    for begin in range(0, len(stream), 1000):
        found += list(reader.feed(stream[begin : begin + 1000]))

    (only,) = found
    assert (only.kind, only.number, bytes(only.payload)) == (Kind.REPLY, 7, payload)


@given(st.integers(-10, 2**70), st.integers(-10, 2**70), st.binary(max_size=20))
def test_the_fields_of_a_call_are_bounded(remaining: int, waited: int, body: bytes) -> None:
    (one,) = FrameReader().feed(call_frame(3, CallFields(remaining, waited), body))
    fields, rest = call_parts(one.payload)

    assert fields == (min(max(0, remaining), 2**64 - 1), min(max(0, waited), 2**64 - 1))
    assert bytes(rest) == body


def test_the_fields_of_other_frames() -> None:
    (reply,) = FrameReader().feed(reply_frame(1, ReplyFields(2**40, 5, is_full=True), b"body"))
    fields, body = reply_parts(reply.payload)
    assert (fields, bytes(body)) == (ReplyFields(2**32 - 1, 5, is_full=True), b"body")
    (pong,) = FrameReader().feed(pong_frame(ReplyFields(7, 5, is_stuck=True)))
    assert (pong.kind, reply_parts(pong.payload)[0]) == (Kind.PONG, ReplyFields(7, 5, is_stuck=True))
    (grant,) = FrameReader().feed(grant_frame(1, 16))
    assert counted(grant.payload) == 16


@pytest.mark.parametrize("parts", [call_parts, reply_parts, counted])
def test_a_payload_that_is_too_short_is_a_frame_error(parts: Any) -> None:
    with pytest.raises(FrameError, match="too short"):
        parts(memoryview(b"ab"))


# --- messages ---

ARRAYS = st.sampled_from(["<f4", "<i4", "<i8"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), min_size=1, max_size=3).map(
        lambda shape: np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    )
)


@given(st.lists(ARRAYS, max_size=4))
def test_arrays_survive_the_wire(outputs: list[Any]) -> None:
    decoded: Reply[Predicted] = codec.Decoder(Reply[Predicted]).decode(
        codec.encode(Reply(5, Predicted(tuple(outputs), 3, "cpu")))
    )

    assert decoded.result is not None
    for before, after in zip(outputs, decoded.result.outputs, strict=True):
        assert after.dtype == before.dtype
        assert np.array_equal(after, before)


def test_every_request_survives_the_wire() -> None:
    ids = Ragged.of([np.array([1, 2, 3]), np.array([4])])
    tokenized = Tokenized(ids, (True, False), Ragged.of([np.zeros((3, 2)), np.zeros((1, 2))]))
    fills = (np.ones((1, 3), np.float32), np.ones((1, 3), np.int32))
    requests: list[Any] = [
        TokenizeRequest(("text", "ü"), True, "input"),
        TokenizeRequest(((1, 2), (3,)), True, "input"),
        PredictRequest(ids, "input"),
        PostprocessRequest(tokenized, (fills,), OutputOptions("/predict", 5), ("text",)),
    ]
    for request in requests:
        kind: Any = type(request)
        call: Call[Any] = codec.Decoder(Call[kind]).decode(codec.encode(Call(CARRIER, "id", request)))
        assert (call.carrier, call.request_id) == (CARRIER, "id")
        assert codec.encode(call.request) == codec.encode(request)


def test_a_failure_survives_the_wire() -> None:
    reply = Reply[Predicted](5, failure=Failure.of(QueueFull("full", retry_after_s=3)))
    decoded: Reply[Predicted] = codec.Decoder(Reply[Predicted]).decode(codec.encode(reply))

    assert decoded.failure is not None
    error = decoded.failure.error()
    assert (type(error), error.message, error.retry_after_s) == (QueueFull, "full", 3)


def test_a_field_that_a_newer_peer_adds_at_the_end_is_ignored() -> None:
    newer = [5, [[], 3, "cpu", "new"], None, "also new"]
    assert codec.Decoder(Reply[Predicted]).decode(msgspec.msgpack.encode(newer)) == Reply(5, Predicted((), 3, "cpu"))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_decode_error(data: bytes) -> None:
    with contextlib.suppress(codec.DecodeError):
        codec.Decoder(Call[PredictRequest]).decode(data)


def _extension(data: bytes, code: int = 1) -> bytes:
    return msgspec.msgpack.encode([5, [[msgspec.msgpack.Ext(code, data)], 3, "cpu"]])


@pytest.mark.parametrize(
    "message",
    [
        _extension(b""),
        _extension(b"\0\1" + struct.pack("!I", 5) + b"\0" * 4),
        _extension(b"\0\1" + struct.pack("!I", 2**32 - 1)),
        _extension(b"\0\3" + struct.pack("!3I", *[2**32 - 1] * 3)),
        _extension(b"\x09\1" + struct.pack("!I", 1) + b"\0" * 4),
        _extension(b"\0\x09" + struct.pack("!9I", *[1] * 9) + b"\0" * 4),
        _extension(b"\0\0", code=2),
    ],
)
def test_a_malformed_array_is_a_decode_error(message: bytes) -> None:
    with pytest.raises(codec.DecodeError):
        codec.Decoder(Reply[Predicted]).decode(message)


def test_what_has_no_form_on_the_wire_is_refused_when_sent() -> None:
    for value in (object(), np.array(["text"]), np.zeros((1,) * 5, np.float32)):
        with pytest.raises(NotImplementedError, match="no form on the wire"):
            codec.encode(Predicted((value,), 0, "cpu"))

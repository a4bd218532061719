"""One caller and one replica over a real socket: calls, failures, cancellation, streams, credits, drain, attacks."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time

import pytest

from deployments.errors import InternalError
from deployments.messages import Call
from deployments.transport import codec, peer, server
from deployments.transport.codec import DecodeError
from deployments.transport.connection import ConnectionRefused, ReplicaLost, Turned
from deployments.transport.frames import MAX_HANDSHAKE_PAYLOAD, CallFields, FrameReader, Kind, call_frame, frame
from deployments.transport.handshake import Caller
from deployments.transport.server import QueueState
from tests.support.channels import (
    CARRIER,
    HOST,
    SECRET,
    Stage,
    Word,
    ask,
    connected,
    on_both_loops,
    open_connection,
    send,
    until,
)


async def ended(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


# --- calls ---


@on_both_loops
async def test_calls_are_answered_each_with_its_own_reply() -> None:
    _, connection = await connected()
    replies = await asyncio.gather(*(ask(connection, f"word {number}") for number in range(50)))
    assert [reply.result for reply in replies] == [f"WORD {number}" for number in range(50)]
    assert connection.ongoing == 0


@on_both_loops
async def test_a_call_brings_its_deadline_and_how_long_it_waited() -> None:
    stage, connection = await connected()
    began_ns = time.monotonic_ns()
    sent = send(connection, "word", timeout_s=5, waited_s=2)
    await sent.reply
    sent.withdraw()
    (envelope,) = stage.envelopes
    assert 4.9e9 < envelope.deadline_ns - envelope.arrived_ns <= 5e9
    assert 2e9 <= envelope.waited_ns < 2.1e9
    assert began_ns < sent.left_ns <= time.monotonic_ns()


@on_both_loops
async def test_the_deadline_counts_from_when_the_frame_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, connection = await connected()
    connection.pause_writing()
    sent = send(connection, "word", timeout_s=5)
    await asyncio.sleep(0.2)
    connection.resume_writing()
    await sent.reply
    sent.withdraw()
    assert 4.7e9 < stage.envelopes[0].deadline_ns - stage.envelopes[0].arrived_ns < 4.81e9
    assert stage.envelopes[0].waited_ns >= 0.19e9


@on_both_loops
async def test_failures_come_back_as_they_are_and_exceptions_without_their_text() -> None:
    _, connection = await connected()
    bad = await ask(connection, "bad")
    assert bad.failure is not None
    assert (bad.failure.kind, bad.failure.message, bad.held_ns) == ("InvalidField", "bad word", 5)
    for text in ("broken", "cancels", "large"):
        failed = await ask(connection, text)
        assert failed.failure is not None
        assert isinstance(failed.failure.error(), InternalError)
        assert "secret" not in failed.failure.message
    assert (await ask(connection, "good")).result == "GOOD"


@on_both_loops
async def test_a_message_that_is_not_of_the_schema_harms_its_own_call_only() -> None:
    stage, connection = await connected()
    with pytest.raises(DecodeError):
        await ask(connection, "wrong")
    now_ns = time.monotonic_ns()
    malformed = connection.call(b"malformed", 1, now_ns, now_ns + 10**10, 10)
    assert (await malformed.reply).failure.kind == "InternalError"
    malformed.withdraw()
    assert (await ask(connection, "good")).result == "GOOD"
    assert stage.server.ongoing == 0


@on_both_loops
async def test_a_result_that_cannot_be_sent_fails_its_own_call() -> None:
    _, connection = await connected()
    unsendable = await ask(connection, "unsendable")
    assert unsendable.failure is not None
    assert unsendable.failure.kind == "InternalError"
    assert (await ask(connection, "good")).result == "GOOD"


@on_both_loops
async def test_a_call_that_is_withdrawn_is_cancelled_in_the_replica() -> None:
    stage, connection = await connected()
    first, second = send(connection, "hang 1"), send(connection, "hang 2")
    await until(lambda: stage.waiting == 2)
    first.withdraw()
    await until(lambda: stage.cancelled == ["hang 1"])
    stage.let_go.set()
    assert (await second.reply).result == "HANG 2"
    second.withdraw()
    assert (stage.server.ongoing, connection.ongoing) == (0, 0)


@on_both_loops
async def test_a_call_that_is_withdrawn_before_it_leaves_is_never_sent() -> None:
    stage, connection = await connected()
    first = send(connection, "hang 1")
    send(connection, "hang 2").withdraw()
    assert (await ask(connection, "word")).result == "WORD"
    assert len(stage.envelopes) == 2
    first.withdraw()


@on_both_loops
async def test_a_reply_that_does_not_come_in_time_is_a_timeout() -> None:
    stage, connection = await connected()
    sent = send(connection, "hang", timeout_s=0.05)
    with pytest.raises(TimeoutError):
        await sent.reply
    sent.withdraw()
    await until(lambda: stage.cancelled == ["hang"])


@on_both_loops
async def test_a_lost_replica_fails_the_calls_that_it_has() -> None:
    stage, connection = await connected()
    sent = send(connection, "hang")
    await until(lambda: stage.waiting == 1)
    await stage.server.close()
    with pytest.raises(ReplicaLost):
        await sent.reply
    sent.withdraw()
    assert not connection.has_room


@on_both_loops
async def test_a_lost_caller_has_its_calls_cancelled() -> None:
    stage, connection = await connected()
    sent = send(connection, "hang")
    await until(lambda: stage.waiting == 1)
    connection.abort("the test ends it")
    await until(lambda: stage.cancelled == ["hang"] and stage.server.ongoing == 0)
    with pytest.raises(ReplicaLost, match="the test ends it"):
        await sent.reply


# --- streams ---


@on_both_loops
async def test_chunks_come_in_order_before_the_reply() -> None:
    _, connection = await connected()
    sent = send(connection, "spell 300")
    chunks = [chunk async for chunk in sent.chunks()]
    assert len(chunks) == 300
    assert chunks[5] == b"\x05"
    assert (await sent.reply).result == "SPELL 300"
    sent.withdraw()


@on_both_loops
async def test_a_slow_reader_stops_its_own_stream_only() -> None:
    stage, connection = await connected()
    slow, taken = send(connection, "spell 1000"), []
    async for chunk in slow.chunks():
        taken.append(chunk)
        if len(taken) == 20:
            break
    assert (await ask(connection, "word")).result == "WORD"
    assert not slow.reply.done()
    slow.withdraw()
    await until(lambda: stage.server.ongoing == 0)


@on_both_loops
async def test_a_stream_ends_when_its_replica_is_lost() -> None:
    stage, connection = await connected()
    sent = send(connection, "spell 1000")

    async def read() -> None:
        async for _ in sent.chunks():
            await stage.server.close()

    with pytest.raises(ReplicaLost):
        await read()
    sent.withdraw()


# --- credits ---


@on_both_loops
async def test_a_caller_sends_no_more_than_the_replica_takes() -> None:
    told: list[bool] = []
    stage, _ = await connected(max_ongoing_requests=2)
    connection = await open_connection(stage.port, changed=lambda: told.append(True))
    first, second = send(connection, "hang 1"), send(connection, "hang 2")
    assert not connection.has_room
    await until(lambda: stage.waiting == 2)
    told.clear()
    first.withdraw()
    await until(lambda: bool(told))
    assert connection.has_room
    second.withdraw()


@on_both_loops
async def test_a_call_beyond_what_others_left_is_turned_away_and_told_when_there_is_room() -> None:
    told: list[bool] = []
    stage, first = await connected(max_ongoing_requests=1)
    holds = send(first, "hang")
    await until(lambda: stage.waiting == 1)
    second = await open_connection(stage.port, changed=lambda: told.append(True))
    sent = send(second, "word")
    with pytest.raises(Turned):
        await sent.reply
    sent.withdraw()
    assert not second.has_room
    assert len(stage.envelopes) == 1
    stage.let_go.set()
    await holds.reply
    holds.withdraw()
    await until(lambda: second.has_room)
    assert told
    assert (await ask(second, "word")).result == "WORD"


@on_both_loops
async def test_replies_tell_the_work_of_others_and_the_queue() -> None:
    stage, connection = await connected()
    other = await open_connection(stage.port)
    holds = send(other, "hang", work=500)
    await until(lambda: stage.waiting == 1)
    stage.queue = QueueState(250.0, True)
    await ask(connection, "word")
    now_s = asyncio.get_running_loop().time()

    assert connection.work(now_s) == pytest.approx(500, rel=0.1)
    assert connection.work(now_s + 2) == 0
    assert connection.wait_ms(now_s) == pytest.approx(250, abs=50)
    assert connection.wait_ms(now_s + 1) == 0
    assert connection.is_full(now_s)
    assert not connection.is_full(now_s + 1)
    assert other.work(now_s) == 500
    holds.withdraw()


# --- the drain ---


@on_both_loops
async def test_a_replica_that_leaves_finishes_what_it_has_and_takes_nothing_new() -> None:
    stage, connection = await connected()
    sent = send(connection, "hang")
    await until(lambda: stage.waiting == 1)
    draining = asyncio.ensure_future(stage.server.drain())
    await until(lambda: connection.is_leaving)
    assert not connection.has_room
    with pytest.raises(ConnectionRefusedError):
        await open_connection(stage.port)
    assert not draining.done()
    stage.let_go.set()
    assert (await sent.reply).result == "HANG"
    sent.withdraw()
    await draining
    await until(lambda: connection.is_lost)


@on_both_loops
async def test_a_call_that_crosses_the_notice_is_served() -> None:
    stage, connection = await connected()
    draining = asyncio.ensure_future(stage.server.drain())
    sent = send(connection, "word")
    assert (await sent.reply).result == "WORD"
    sent.withdraw()
    await draining


@on_both_loops
async def test_a_caller_that_hangs_does_not_keep_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LEAVE_S", 0.1)
    stage, connection = await connected()
    monkeypatch.setattr(connection, "leave", lambda: None)
    await stage.server.drain()


@on_both_loops
async def test_a_drain_without_callers_ends_at_once() -> None:
    stage = await Stage().listen()
    await stage.server.drain()
    await stage.server.close()


@on_both_loops
async def test_no_free_port_is_an_error_that_names_the_range() -> None:
    stage = await Stage().listen()
    with pytest.raises(OSError, match=f"no port from {stage.port} to {stage.port} can be listened on"):
        await Stage().server.listen(HOST, stage.port, stage.port)
    await stage.server.close()


# --- attacks ---


async def answer_to(port: int, data: bytes) -> bytes:
    """Send bytes as a stranger, and return all that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(data)
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        await ended(writer)


@on_both_loops
async def test_strangers_are_refused_and_others_served(caplog: pytest.LogCaptureFixture) -> None:
    stage, connection = await connected()
    hello = frame(Kind.HELLO, payload=Caller(SECRET).hello())
    garbage = [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        bytes(64),
        frame(Kind.CALL, 1, b"x" * 30),
        struct.pack("!IBI", MAX_HANDSHAKE_PAYLOAD + 1, Kind.HELLO, 0),
        hello + frame(Kind.PROOF, payload=b"\x91\xc4\x00"),
        hello + frame(Kind.CALL, 1, b"x" * 30),
    ]
    for data in garbage:
        assert b"WELCOME" not in (answer := await answer_to(stage.port, data))
        assert SECRET.encode() not in answer
    assert SECRET not in caplog.text
    assert (await ask(connection, "word")).result == "WORD"


@on_both_loops
async def test_a_wrong_secret_and_a_wrong_version_say_so() -> None:
    stage, _ = await connected()
    with pytest.raises(ConnectionRefused, match="does not know the secret"):
        await open_connection(stage.port, secret="another")
    with pytest.raises(ConnectionRefused, match=r"speaks the versions \[9\]"):
        await open_connection(stage.port, versions=(9,))


@on_both_loops
@pytest.mark.parametrize(
    "says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(Kind.WELCOME, payload=b"\x91\x05")], ids=["http", "welcome"]
)
async def test_who_has_not_proved_to_be_the_replica_gets_no_call(says: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read()
        await ended(writer)

    other = await asyncio.start_server(answer, HOST, 0)
    with pytest.raises((ReplicaLost, ConnectionRefused)):
        await open_connection(other.sockets[0].getsockname()[1])
    other.close()
    await other.wait_closed()


@on_both_loops
async def test_a_stranger_who_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HANDSHAKE_S", 0.05)
    stage, _ = await connected()
    assert await answer_to(stage.port, b"") == b""


@on_both_loops
async def test_strangers_cannot_take_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MAX_STRANGERS", 3)
    stage, connection = await connected()
    silent = [await asyncio.open_connection(HOST, stage.port) for _ in range(6)]
    for reader, _ in silent[3:]:
        assert await reader.read() == b""
    assert (await ask(connection, "word")).result == "WORD"
    for _, writer in silent:
        await ended(writer)


@on_both_loops
@pytest.mark.parametrize(
    "attack",
    [frame(Kind.WELCOME), frame(Kind.CALL, 1, b"short"), frame(Kind.GRANT, 1, b"x")],
    ids=["kind", "short", "grant"],
)
async def test_a_caller_that_breaks_the_protocol_loses_its_connection_only(attack: bytes) -> None:
    stage, connection = await connected()
    broken = await open_connection(stage.port)
    if attack == frame(Kind.GRANT, 1, b"x"):
        sent = send(broken, "hang")
        await until(lambda: stage.waiting == 1)
        attack = frame(Kind.GRANT, sent.number, b"x")
    broken.send(attack)
    await until(lambda: broken.is_lost)
    assert (await ask(connection, "word")).result == "WORD"


@on_both_loops
async def test_a_caller_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "UNREAD_S", 0.2)
    stage, connection = await connected()
    reader, writer = await asyncio.open_connection(HOST, stage.port, limit=2**16)
    caller, frames = Caller(SECRET), FrameReader()
    writer.write(frame(Kind.HELLO, payload=caller.hello()))
    (challenge,) = list(frames.feed(await reader.read(2**16)))
    writer.write(frame(Kind.PROOF, payload=caller.proof(challenge.payload)))
    for number in range(1, 91):
        body = codec.encode(Call(CARRIER, "id", Word("x" * 200_000)))
        writer.write(call_frame(number, CallFields(10**7, 0), body))
    # Nothing is read from here on.
    await until(lambda: len(stage.envelopes) > 5)
    await until(lambda: stage.server.callers == 1)
    assert (await ask(connection, "word")).result == "WORD"
    await ended(writer)


# --- traces that are kept ---


@on_both_loops
async def test_each_end_tells_the_other_which_traces_are_kept() -> None:
    stage = await Stage().listen()
    heard: list[list[tuple[int, bool]]] = []
    connection = await open_connection(stage.port, on_keep=heard.append)
    told: list[list[tuple[int, bool]]] = []
    stage.server.on_keep = told.append
    many = [(2**128 - 1 - number, number % 2 == 0) for number in range(2500)]

    connection.keep([(1, True), (2, False)])
    stage.server.keep(many)
    await ask(connection, "word")
    await until(lambda: len(heard) == 3)

    assert told == [[(1, True), (2, False)]]
    assert [each for part in heard for each in part] == many


@on_both_loops
async def test_a_peer_of_the_first_version_is_told_nothing() -> None:
    stage = await Stage(versions=(1,)).listen()
    heard: list[list[tuple[int, bool]]] = []
    connection = await open_connection(stage.port, on_keep=heard.append)
    connection.keep([(1, True)])
    stage.server.keep([(1, True)])
    assert (await ask(connection, "word")).result == "WORD"
    assert heard == []

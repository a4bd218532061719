"""A stage that replies in capitals, for tests of the transport: a real server and real connections, no Ray."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import uvloop

from deployments.errors import Failure, InvalidField
from deployments.messages import Call, Carrier, Envelope, Reply
from deployments.transport import codec
from deployments.transport.connection import Connection, SentCall
from deployments.transport.discovery import Address
from deployments.transport.server import ChannelServer, Chunks, QueueState

SECRET = "a secret"
HOST = "127.0.0.1"
_LIMIT_S = 20
to_close: list[Callable[[], Awaitable[None]]] = []
"""What the running test has opened."""
CARRIER = Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01")


class Word(msgspec.Struct, frozen=True, array_like=True):
    text: str
    work: int = 1


class Stage:
    """Replies in capitals. ``hang`` waits until ``let_go``, ``bad`` fails, ``broken`` raises, ``spell`` and ``count``
    stream, ``begins`` streams once and waits.

    Attributes:
        envelopes: of the calls so far.
        cancelled: texts of the calls that were cancelled.
        enough: parts of which a caller of ``count`` has enough.
    """

    def __init__(self, max_ongoing_requests: int = 100, **options: Any) -> None:
        self.envelopes: list[Envelope] = []
        self.cancelled: list[str] = []
        self.let_go = asyncio.Event()
        self.waiting = 0
        self.enough: list[int] = []
        self.queue = QueueState()
        self.server = ChannelServer(self._reply, Word, SECRET, max_ongoing_requests, lambda: self.queue, **options)
        self.port = 0

    async def listen(self, port: int = 0) -> Stage:
        self.port = await self.server.listen(HOST, port, port)
        to_close.append(self.server.close)
        return self

    def address(self, replica_id: str = "replica-1") -> Address:
        return Address(replica_id, HOST, self.port, SECRET)

    async def _reply(self, envelope: Envelope, word: Word, chunks: Chunks) -> Reply[str]:
        self.envelopes.append(envelope)
        match word.text.partition(" "):
            case "hang", _, _:
                self.waiting += 1
                try:
                    await self.let_go.wait()
                except asyncio.CancelledError:
                    self.cancelled.append(word.text)
                    raise
                finally:
                    self.waiting -= 1
            case "bad", _, _:
                return Reply(5, failure=Failure.of(InvalidField("bad word", param="word")))
            case "broken", _, _:
                raise RuntimeError("secret")
            case "cancels", _, _:
                raise asyncio.CancelledError
            case "large", _, _:
                return Reply(5, "x" * (65 * 1024 * 1024))
            case "unsendable", _, _:
                return Reply(5, object())  # type: ignore[arg-type]
            case "wrong", _, _:
                return Reply(5, 17)  # type: ignore[arg-type]
            case "spell", _, count:
                for number in range(int(count)):
                    await chunks.send(number)
            case "count", _, _:
                # Until the caller has enough.
                chunks.on_enough = lambda part: self.enough.append(part)
                number = 0
                while not self.enough:
                    await chunks.send(number)
                    number += 1
                    await asyncio.sleep(0)
            case "begins", _, _:
                await chunks.send(0)
                self.waiting += 1
                await self.let_go.wait()
        return Reply(7, word.text.upper())


class Cable:
    """Passes on what is sent to a port and from there, until it is frozen: as if the process there hung, the
    connections stay.

    Args:
        port: of the stage at its other end.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen(self) -> Cable:
        server = await asyncio.start_server(self._connect, HOST)
        self.port = server.sockets[0].getsockname()[1]

        async def close() -> None:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        to_close.append(close)
        return self

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(HOST, self._to)
        for source, target in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.ensure_future(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._flows.wait()
                target.write(data)
        except ConnectionError:
            pass
        finally:
            target.close()


async def open_connection(port: int, secret: str = SECRET, changed: Any = lambda: None, **options: Any) -> Connection:
    connection = Connection(secret, codec.Decoder(Reply[str]), changed, **options)

    async def close() -> None:
        connection.abort("the test is over")
        # The transport closes its socket in the next tick.
        await asyncio.sleep(0)

    to_close.append(close)
    await asyncio.get_running_loop().create_connection(lambda: connection, HOST, port)
    await connection.ready
    return connection


async def connected(max_ongoing_requests: int = 100, **options: Any) -> tuple[Stage, Connection]:
    stage = await Stage(max_ongoing_requests, **options).listen()
    return stage, await open_connection(stage.port)


def send(connection: Connection, text: str, work: int = 1, timeout_s: float = 10.0, waited_s: float = 0.0) -> SentCall:
    now_ns = time.monotonic_ns()
    body = codec.encode(Call(CARRIER, "id", Word(text, work)))
    return connection.call(body, work, now_ns - int(waited_s * 1e9), now_ns + int(timeout_s * 1e9), timeout_s)


async def ask(connection: Connection, text: str) -> Reply[str]:
    sent = send(connection, text)
    try:
        return await sent.reply  # type: ignore[no-any-return]
    finally:
        sent.withdraw()


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test on asyncio's loop and on uvloop, which Ray uses where it is installed, with a time limit.

    What was opened is closed in the end, also after a failure.
    """

    async def run_and_close(running: Coroutine[Any, Any, None]) -> None:
        try:
            await asyncio.wait_for(running, _LIMIT_S)
        finally:
            while to_close:
                await to_close.pop()()

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        for make_loop in (asyncio.new_event_loop, uvloop.new_event_loop):
            with asyncio.Runner(loop_factory=make_loop) as runner:
                runner.run(run_and_close(test(*arguments, **named)))

    return run


async def until(condition: Any) -> None:
    """Let the loop run until the condition holds; the test's own time limit ends a wait for what never comes."""
    while not condition():
        await asyncio.sleep(0.001)

"""The replicas of one stage as one caller sees them: connections to all of them, and the choice among them.

1. A call goes to the replica with the least work: what this caller has sent to it and has no reply to, which is never
   stale, and what others have there, as the replica's last reply told. Of many replicas, a few sampled at random are
   compared; otherwise all callers with nothing outstanding would choose the same one.
2. A replica takes at most ``max_ongoing_requests`` calls. If none has room, calls wait here, in order of arrival.
3. A replica that leaves, or that Serve no longer lists, gets no new call and finishes those that it has. A connection
   that ends is made anew as long as Serve lists the replica.
4. If there is no replica, the first call wakes the deployment, through Serve.
5. A replica of which nothing is heard for a second although it has calls, or whose device is stuck, gets calls only if
   there is no other. After two seconds of silence its connection is given up, if there is another replica, so that its
   calls are sent again. (It may be slow and not hang; calls change nothing, so to be wrong costs work only.)
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.errors import DeadlinePassed, NoReplicaReady
from deployments.messages import Reply
from deployments.telemetry.names import Service
from deployments.transport import codec
from deployments.transport.connection import Connection, ConnectionRefused, ReplicaLost, SentCall, least_work
from deployments.transport.discovery import Address, Addresses, DeploymentFailed, Directory

_SAMPLED = 8
_CONNECT_S = 2.0
_RETRY_FIRST_S, _RETRY_LAST_S, _RETRY_REFUSED_S = 0.1, 2.0, 10.0
_WAKE_AGAIN_S = 1.0
_GIVE_UP_S = 2.0
_MAX_RETRY_AFTER_S = 60
_logger = logging.getLogger("slowlens.transport")


@dataclass(eq=False, slots=True)
class _Waiting:
    """A call that no replica has room for."""

    send: Callable[[Connection], SentCall]
    sent: asyncio.Future[SentCall]


class ReplicaSet:
    """The replicas of one stage.

    Args:
        stage: its name, for messages.
        directory: says which replicas there are.
        result: type of the results.
        no_replica_wait_s: how long a call waits if there is no replica at all.
    """

    def __init__(self, stage: Service, directory: Directory, result: Any, no_replica_wait_s: float) -> None:
        self._stage, self._directory, self._no_replica_wait_s = stage, directory, no_replica_wait_s
        self._decoder: codec.Decoder[Reply[Any]] = codec.Decoder(Reply[result])
        self._listed: dict[str, Address] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._connections: dict[str, Connection] = {}
        self._waiting: deque[_Waiting] = deque()
        self._waking: asyncio.Task[None] | None = None
        self._problems: dict[str, str] = {}
        self.on_keep: Callable[[list[tuple[int, bool]]], None] = lambda _: None
        """Called with the traces that a replica keeps."""

    def start(self) -> None:
        """Connect to the replicas that there are, and to those that come."""
        self._directory.watch(self._update)

    async def close(self) -> None:
        tasks = [*self._connecting.values(), *([self._waking] if self._waking is not None else [])]
        for task in tasks:
            task.cancel()
        self._listed.clear()
        for connection in tuple(self._connections.values()):
            connection.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def keep(self, kept: Sequence[tuple[int, bool]]) -> None:
        """Tell all replicas which traces are kept, and whether each is for its own sake."""
        for connection in self._connections.values():
            connection.keep(kept)

    # --- what a caller asks ---

    @property
    def connected(self) -> int:
        """Replicas that are connected and do not leave."""
        return sum(not (one.is_lost or one.is_leaving) for one in self._connections.values())

    @property
    def is_ready(self) -> bool:
        return self.connected > 0

    def wait_ms(self) -> float:
        """The shortest wait for a device that a replica told of; infinite if all of them refuse calls."""
        now_s = asyncio.get_running_loop().time()
        waits = [one.wait_ms(now_s) for one in self._connections.values() if not one.is_full(now_s)]
        return min(waits) if waits else float("inf") if self._connections else 0.0

    def retry_after_s(self) -> int:
        """How long somebody whom all replicas refuse should wait: as long as the shortest queue takes."""
        now_s = asyncio.get_running_loop().time()
        shortest_ms = min((one.wait_ms(now_s) for one in self._connections.values()), default=0.0)
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(shortest_ms / 1e3)))

    async def send(self, send: Callable[[Connection], SentCall], timeout_s: float) -> SentCall:
        """Send a call to the replica with the least work. Waits until one has room.

        Raises:
            NoReplicaReady: there is no replica, and for ``no_replica_wait_s`` there was none.
            DeadlinePassed: ``timeout_s`` have passed.
        """
        if not self._waiting and (connection := self._least_work()) is not None:
            return send(connection)
        waiting = _Waiting(send, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            return await self._wait(waiting, timeout_s)
        finally:
            if not waiting.sent.done():
                self._waiting.remove(waiting)
                waiting.sent.cancel()

    async def _wait(self, waiting: _Waiting, timeout_s: float) -> SentCall:
        self._wake()
        try:
            await asyncio.wait([waiting.sent], timeout=min(timeout_s, self._no_replica_wait_s))
            if not waiting.sent.done() and self._no_replica_wait_s < timeout_s:
                if not self.is_ready:
                    raise NoReplicaReady(self._why_none(), retry_after_s=5)
                await asyncio.wait([waiting.sent], timeout=timeout_s - self._no_replica_wait_s)
        except asyncio.CancelledError:
            if waiting.sent.done() and not waiting.sent.cancelled() and waiting.sent.exception() is None:
                waiting.sent.result().withdraw()
            raise
        if not waiting.sent.done():
            raise DeadlinePassed(f"the deadline passed while waiting for a replica of the {self._stage}")
        return waiting.sent.result()

    def _why_none(self) -> str:
        if self._listed:
            # Where, and why not, is in the log.
            return f"no replica of the {self._stage} can be reached"
        return f"no replica of the {self._stage} is ready"

    # --- choosing ---

    def _least_work(self) -> Connection | None:
        if len(self._connections) == 1:
            (only,) = self._connections.values()
            return only if only.has_room else None
        connections = list(self._connections.values())
        if len(connections) > _SAMPLED:
            sampled = random.sample(connections, _SAMPLED)
            connections = sampled if any(one.has_room for one in sampled) else connections
        return least_work(connections, asyncio.get_running_loop().time())

    def _send_waiting(self) -> None:
        """Called when a replica has room that had none."""
        while self._waiting:
            if (connection := self._least_work()) is None:
                self._wake()
                return
            waiting = self._waiting.popleft()
            if not waiting.sent.done():
                waiting.sent.set_result(waiting.send(connection))

    # --- the replicas ---

    def _update(self, addresses: Addresses) -> None:
        """Called with the replicas that Serve lists, whenever they change."""
        self._listed = {address.replica_id: address for address in addresses}
        self._problems = {key: problem for key, problem in self._problems.items() if key in self._listed}
        for replica_id, connection in self._connections.items():
            if replica_id not in self._listed:
                connection.leave()
        for replica_id, task in tuple(self._connecting.items()):
            if replica_id not in self._listed:
                task.cancel()
        for replica_id, address in self._listed.items():
            if replica_id not in self._connecting:
                self._connecting[replica_id] = asyncio.ensure_future(self._keep_connected(address))

    async def _keep_connected(self, address: Address) -> None:
        """Connect, and connect again when the connection has ended, as long as the replica is listed."""
        try:
            await self._connect_and_watch(address)
        finally:
            del self._connecting[address.replica_id]
            if address.replica_id in self._listed:
                # It is listed again, or still.
                self._update(tuple(self._listed.values()))

    async def _connect_and_watch(self, address: Address) -> None:
        pause_s = _RETRY_FIRST_S
        while address.replica_id in self._listed:
            lost = asyncio.Event()
            try:
                connection = await self._connect(address, lost)
            except ConnectionRefused as error:
                self._note(address, f"refused the connection: {error}")
                pause_s = _RETRY_REFUSED_S
            except (OSError, ReplicaLost) as error:
                self._note(address, f"cannot be reached: {error or type(error).__name__}")
            else:
                self._connections[address.replica_id] = connection
                self._problems.pop(address.replica_id, None)
                self._send_waiting()
                pause_s = _RETRY_FIRST_S
                try:
                    await lost.wait()
                finally:
                    # Cancelled if Serve no longer lists it; its calls go on.
                    if connection.is_lost:
                        self._connections.pop(address.replica_id, None)
                if connection.is_leaving:
                    return
                self._note(address, connection.why_lost)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(pause_s * 2, _RETRY_LAST_S)

    async def _connect(self, address: Address, lost: asyncio.Event) -> Connection:
        loop = asyncio.get_running_loop()

        def changed() -> None:
            if connection.is_lost:
                lost.set()
                if self._connections.get(address.replica_id) is connection:
                    del self._connections[address.replica_id]
            else:
                self._give_up_if_silent(connection)
            self._send_waiting()

        connection = Connection(address.secret, self._decoder, changed, on_keep=self.on_keep)
        async with asyncio.timeout(_CONNECT_S):
            await loop.create_connection(lambda: connection, address.host, address.port)
            try:
                await connection.ready
            except BaseException:
                connection.abort("the handshake did not end well")
                raise
        return connection

    def _give_up_if_silent(self, connection: Connection) -> None:
        now_s = asyncio.get_running_loop().time()
        silent_s = connection.silent_s(now_s)
        if silent_s <= _GIVE_UP_S:
            return
        if any(other.has_room and not other.hangs(now_s) for other in self._connections.values()):
            connection.abort(f"nothing has been heard of it for {silent_s:.1f} s")

    def _note(self, address: Address, problem: str) -> None:
        """Log what is wrong with a replica, once until it changes."""
        if self._problems.get(address.replica_id) != problem:
            _logger.warning("%s: %s", address, problem)
        self._problems[address.replica_id] = problem

    # --- from zero ---

    def _wake(self) -> None:
        # One that leaves takes no new call, however long it stays.
        if not self.connected and (self._waking is None or self._waking.done()):
            self._waking = asyncio.ensure_future(self._wake_up())

    async def _wake_up(self) -> None:
        while self._waiting and not self.connected:
            try:
                await self._directory.wake()
            except DeploymentFailed:
                self._fail_waiting()
                return
            except Exception as error:
                _logger.warning("the %s could not be woken: %r", self._stage, error)
            await asyncio.sleep(_WAKE_AGAIN_S)

    def _fail_waiting(self) -> None:
        for waiting in self._waiting:
            if not waiting.sent.done():
                unready = NoReplicaReady(f"the {self._stage} failed to deploy", retry_after_s=30)
                waiting.sent.set_exception(unready)
                waiting.sent.exception()
        self._waiting.clear()

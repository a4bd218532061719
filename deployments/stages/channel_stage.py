"""What the stages behind the ingress have in common: a channel that callers reach directly, and Serve's own calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.errors import DeadlinePassed
from deployments.messages import Reply
from deployments.stages.replica import Placement, Stoppable, tune_garbage_collector
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import StageRecord
from deployments.transport.connection import LINGER_S
from deployments.transport.discovery import Address
from deployments.transport.handshake import new_secret
from deployments.transport.server import ChannelServer, Handler, QueueState

Result = TypeVar("Result")
Made = TypeVar("Made")
Handled = Reply[Result] | Coroutine[Any, Any, Reply[Result]]
"""What a stage's method returns: the reply, or a coroutine if it takes a while."""


class ChannelStage(Stoppable):
    """Base of a stage whose requests come through a channel. Its constructor calls ``_serve``.

    Serve calls the other methods: to learn where the replica listens, to wake the deployment, and to stop.
    """

    _channel: ChannelServer | None = None

    def _serve(
        self,
        handler: Handler,
        request: type[Any],
        config: AppConfig,
        placement: Placement,
        telemetry: Telemetry,
        queue: Callable[[], QueueState] = QueueState,
    ) -> None:
        self._telemetry, self._placement, self._ports = telemetry, placement, config.transport.ports
        self._channel = ChannelServer(handler, request, new_secret(), placement.max_ongoing_requests, queue)
        self._channel.on_keep = telemetry.keep
        self._is_open = True

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve once, when the replica is ready: what it returns reaches every caller's directory."""
        tune_garbage_collector()
        return (await self.listen()).metadata()

    async def listen(self) -> Address:
        """Listen for callers. Raises OSError if no port of ``transport.ports`` is free."""
        assert self._channel is not None
        self._telemetry.watch_loop()
        self._telemetry.tell(self._channel.keep)
        host = self._placement.host
        port = await self._channel.listen(host, *self._ports)
        return Address(self._placement.identity.replica_id, host, port, self._channel.secret)

    async def ready(self) -> None:
        """Called through Serve's handle by a caller that has no replica: the call waits there until there is one."""

    async def _stop(self) -> None:
        """Take no new call, finish those that are here, and stop."""
        assert self._channel is not None
        await self._channel.drain()
        if self._telemetry.is_retroactive:
            # Which traces of the last calls are kept is known a moment after their replies.
            await asyncio.sleep(LINGER_S)
        await self._channel.close()
        self._release()
        self._telemetry.close()

    def _release(self) -> None:
        """Give up what the stage holds besides, before its last telemetry is sent."""


_THREADS = 2
"""Of a stage, for work that takes long: a long text does not wait for a very long one."""


class EventLoopStage(ChannelStage):
    """Base of a stage that works in its event loop, and in threads beside it. Its constructor sets ``_meter``."""

    _meter: EventLoopMeter
    _threads: ThreadPoolExecutor | None = None

    def _handle(
        self, record: StageRecord, compute: Callable[[], Made], finish: Callable[[Made], Result], *, takes_long: bool
    ) -> Handled[Result]:
        """Compute and finish what one call asks for: at once, or, if it takes long, compute in a thread meanwhile."""
        if takes_long:
            return self._handle_in_thread(record, compute, finish)
        result: Result | None = None
        with self._meter.requests(1), self._telemetry.stage(record):
            result = finish(compute())
        return record.reply(result)

    async def _handle_in_thread(
        self, record: StageRecord, compute: Callable[[], Made], finish: Callable[[Made], Result]
    ) -> Reply[Result]:
        result: Result | None = None
        with self._meter.requests(1), self._telemetry.stage(record):
            with self._meter.in_thread():
                made = await self._in_thread(record, compute)
            result = finish(made)
        return record.reply(result)

    async def _in_thread(self, record: StageRecord, compute: Callable[[], Made]) -> Made:
        """Compute in a thread, when one is free: unless the caller has gone by then, or the deadline has passed."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="slowlens-compute")

        def in_time() -> Made:
            self._telemetry.watch_thread()
            if time.monotonic_ns() > record.deadline_ns:
                raise DeadlinePassed("the deadline passed while this stage was busy with other requests")
            return compute()

        return await asyncio.get_running_loop().run_in_executor(self._threads, in_time)

    def _release(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report().stats()

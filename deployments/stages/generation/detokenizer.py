"""The ingress's side of detokenization: what all requests have at one moment travels in one message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from deployments.errors import ApiError
from deployments.messages import Detokenized, DetokenizedItem, DetokenizeItem, DetokenizeRequest
from deployments.transport.stage_client import StageClient

_logger = logging.getLogger("slowlens.ingress")
Waiting = tuple[Sequence[DetokenizeItem], asyncio.Future[Sequence[DetokenizedItem]]]


class Detokenizer:
    """Collects items for a moment and sends them together.

    The tokens of a step reach the ingress in one packet, so all requests of the step ask in the same turn of the event
    loop.
    """

    def __init__(self, client: StageClient[Any, Any]) -> None:
        self._client = client
        self._waiting: list[Waiting] = []
        self._deadline_ns = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def convert(
        self, request_id: str, deadline_ns: int, items: Sequence[DetokenizeItem]
    ) -> Sequence[DetokenizedItem]:
        """Return the texts of these items, in their order. Raises ApiError."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[DetokenizedItem]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush, request_id)
        self._waiting.append((items, future))
        self._deadline_ns = max(self._deadline_ns, deadline_ns)
        return await future

    def _flush(self, request_id: str) -> None:
        waiting, self._waiting = self._waiting, []
        deadline_ns, self._deadline_ns = self._deadline_ns, 0
        task = asyncio.ensure_future(self._send(request_id, deadline_ns, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, request_id: str, deadline_ns: int, waiting: Sequence[Waiting]) -> None:
        request = DetokenizeRequest(tuple(item for items, _ in waiting for item in items))
        try:
            reply: Detokenized = await self._client.post(request_id, request, deadline_ns)
        except Exception as error:
            if not isinstance(error, ApiError):
                _logger.exception("the texts of %d requests could not be made", len(waiting))
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        begin = 0
        for items, future in waiting:
            if not future.done():
                future.set_result(reply.items[begin : begin + len(items)])
            begin += len(items)

"""Checks whether stages have replicas by asking Serve's controller, not the replicas: it never queues behind requests.

A replica counts as running once its constructor has returned, which for the model means loaded and warm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ray import serve

from deployments.telemetry.names import Service

_logger = logging.getLogger("slowlens.ingress")
_MAX_AGE_S = 0.5
RunningReplicas = Callable[[], Mapping[str, int]]


def running_replicas(app_name: str) -> dict[str, int]:
    """Running replicas by deployment. Blocks for one call to the controller."""
    app = serve.status().applications.get(app_name)
    if app is None:
        return {}
    return {
        name: sum(count for state, count in status.replica_states.items() if state == "RUNNING")
        for name, status in app.deployments.items()
    }


class Readiness:
    """Caches the running replicas for half a second, and shares one query among all waiting callers.

    Args:
        ask: returns the running replicas by deployment name; may block.
        deployments: the deployment name of each stage.
    """

    def __init__(self, ask: RunningReplicas, deployments: Mapping[Service, str]) -> None:
        self._ask, self._deployments = ask, deployments
        self._answer: Mapping[str, int] = {}
        self._answered_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def missing(self, patience_s: float) -> list[Service] | None:
        """The stages without a running replica; None if the controller fails or does not respond in time."""
        try:
            await asyncio.wait_for(self._refresh(), patience_s)
        except Exception as error:
            _logger.warning("Serve's controller did not report which replicas are running: %r", error)
            return None
        return [stage for stage, name in self._deployments.items() if self._answer.get(name, 0) == 0]

    async def _refresh(self) -> None:
        if time.monotonic() - self._answered_s < _MAX_AGE_S:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._fetch())
        # Shielded: a caller that gives up must not cancel the query for the others.
        await asyncio.shield(self._asking)

    async def _fetch(self) -> None:
        self._answer = await asyncio.to_thread(self._ask)
        self._answered_s = time.monotonic()

"""Queries to the running application that are not available over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray import serve

from tests.support.http import Answer


def wait_for_depth(depth: int, *, running: bool = False) -> None:
    """Wait until ``depth`` inputs wait in the model replica and, with ``running``, others are on the device."""
    model = serve.get_deployment_handle("Model", "slowlens")
    while True:
        state = model.queue_state.remote().result()
        if state["waiting"] >= depth and (state["running"] or not running):
            return


def run_together(sends: Sequence[Callable[[], Answer]], let_go: Callable[[], None]) -> list[Answer]:
    """Send each request once the previous one waits for the held device, then release the device."""
    with ThreadPoolExecutor(len(sends)) as pool:
        futures = []
        for depth, send in enumerate(sends, start=1):
            futures.append(pool.submit(send))
            wait_for_depth(depth)
        let_go()
        return [future.result() for future in futures]

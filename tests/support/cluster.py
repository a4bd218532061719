"""Questions to the running application that HTTP does not answer."""

from __future__ import annotations

from ray import serve


def wait_for_depth(depth: int, *, running: bool = False) -> None:
    """Until so many inputs wait in the model replica and, with ``running``, others are on the device."""
    model = serve.get_deployment_handle("Model", "slowlens")
    while True:
        state = model.queue_state.remote().result()
        if state["waiting"] >= depth and (state["running"] or not running):
            return

"""Tests that run in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from deployments.simulate.virtual_time import now_ns, run

__all__ = ["now_ns", "run", "virtual"]


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in virtual time."""

    def wrapper(**arguments: Mapping[str, Any]) -> None:
        run(test(**arguments))

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper

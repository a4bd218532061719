"""An event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Mapping
from typing import Any


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def now_ns() -> int:
    """Return the running loop's time, for use as a monotonic clock."""
    return round(asyncio.get_running_loop().time() * 1e9)


def run(test: Awaitable[Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(test)  # type: ignore[arg-type]


def virtual(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs in virtual time."""

    def wrapper(**arguments: Mapping[str, Any]) -> None:
        run(test(**arguments))

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper

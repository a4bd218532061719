"""What Serve says of the replicas reaches those who watch them, and a call by Serve's handle wakes a deployment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.transport.discovery import Address, Addresses, DeploymentFailed, ServeDirectory, publish

ADDRESS = Address("replica-1", "10.0.0.3", 21000, "secret")


def running(address: Address | None, replica_id: str = "replica-1") -> Any:
    """A replica as Serve's router has it; without an address, one of another program."""
    metadata = address.metadata() if address is not None else {"other": 1}
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=replica_id), replica_metadata=metadata)


class Handle:
    """Stands for a ``DeploymentHandle``."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.app_name, self.deployment_name = "app", name
        self.calls = 0
        self._error = error

    def options(self, **_: Any) -> Handle:
        return self

    async def remote(self) -> None:
        self.calls += 1
        if self._error is not None:
            raise self._error


def directory(handle: Handle) -> ServeDirectory:
    given: Any = handle
    return ServeDirectory(given)


def test_who_watches_gets_the_replicas_that_there_are_and_every_change() -> None:
    async def run() -> None:
        publish(("app", "Watched"), [running(ADDRESS)])
        seen: list[Addresses] = []
        directory(Handle("Watched")).watch(seen.append)
        # From the router's thread.
        await asyncio.to_thread(publish, ("app", "Watched"), [running(ADDRESS), running(None, "replica-2")])
        await asyncio.to_thread(publish, ("app", "Other"), [running(ADDRESS)])
        await asyncio.to_thread(publish, ("other", "Watched"), [running(ADDRESS)])
        await asyncio.to_thread(publish, ("app", "Watched"), [])
        while len(seen) < 3:
            await asyncio.sleep(0.001)
        assert seen == [(ADDRESS,), (ADDRESS,), ()]

    asyncio.run(run())


def test_an_address_is_shown_without_its_secret() -> None:
    assert str(ADDRESS) == "replica-1 at 10.0.0.3:21000"
    assert "secret" not in repr([ADDRESS])


def test_a_call_by_the_handle_wakes_the_deployment() -> None:
    handle = Handle("Model")
    asyncio.run(directory(handle).wake())
    assert handle.calls == 1


def test_a_deployment_that_failed_cannot_be_woken() -> None:
    unavailable: Any = DeploymentUnavailableError(None)  # type: ignore[arg-type]
    with pytest.raises(DeploymentFailed):
        asyncio.run(directory(Handle("Model", unavailable)).wake())

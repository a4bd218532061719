"""Which replicas a deployment has, and where they listen: Serve says so.

A replica publishes where it listens and its secret when it becomes ready (``record_replica_metadata``). Serve's
controller sends that, with every change of the set of running replicas, to the request router of every handle. This
router only passes it on: it routes nothing but the call that wakes a deployment from zero replicas.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

ROUTER = "deployments.transport.discovery:ReplicaDirectory"
_KEY = "slowlens.transport"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens, and what its callers prove that they know."""

    replica_id: str
    host: str
    port: int
    secret: str

    def __repr__(self) -> str:
        return f"{self.replica_id} at {self.host}:{self.port}"

    def metadata(self) -> dict[str, Any]:
        """What ``record_replica_metadata`` returns: JSON."""
        return {_KEY: {"host": self.host, "port": self.port, "secret": self.secret}}

    @classmethod
    def of(cls, replica_id: str, metadata: Mapping[str, Any]) -> Address | None:
        published = metadata.get(_KEY)
        return cls(replica_id, **published) if published is not None else None


class DeploymentFailed(Exception):
    """Serve could not deploy it, so that no replica will come."""


Addresses = tuple[Address, ...]
Listener = Callable[[Addresses], None]


class Directory(Protocol):
    """Where the replicas of one deployment are found."""

    def watch(self, listener: Listener) -> None:
        """Call ``listener`` on the running loop with the replicas that there are, now and after every change."""
        ...

    async def wake(self) -> None:
        """Return when there is a replica. If there is none, have one started. Raises DeploymentFailed."""
        ...


Deployment = tuple[str, str]
"""Names of an application and of a deployment in it."""


class ServeDirectory:
    """The replicas of the deployment that a handle belongs to."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._deployment = handle.app_name, handle.deployment_name
        # Also makes the handle's router, without a call.
        self._handle = handle.options(method_name="ready", _by_reference=False)

    def watch(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()

        def pass_on(addresses: Addresses) -> None:
            loop.call_soon_threadsafe(listener, addresses)

        _publications.subscribe(self._deployment, pass_on)

    async def wake(self) -> None:
        try:
            await self._handle.remote()
        except DeploymentUnavailableError as error:
            raise DeploymentFailed from error


class _Publications:
    """What each router of this process last published, by deployment. Routers may run in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[Deployment, Addresses] = {}
        self._listeners: dict[Deployment, list[Listener]] = {}

    def publish(self, deployment: Deployment, addresses: Addresses) -> None:
        with self._lock:
            self._last[deployment] = addresses
            listeners = tuple(self._listeners.get(deployment, ()))
        for listener in listeners:
            listener(addresses)

    def subscribe(self, deployment: Deployment, listener: Listener) -> None:
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            last = self._last.get(deployment, ())
        listener(last)


_publications = _Publications()


def publish(deployment: Deployment, replicas: Iterable[RunningReplica]) -> None:
    """Tell who watches the deployment in this process that these are its replicas."""
    found = (Address.of(one.replica_id.unique_id, one.replica_metadata) for one in replicas)
    _publications.publish(deployment, tuple(address for address in found if address is not None))


class ReplicaDirectory(FIFOMixin, RequestRouter):
    """``request_router_config.request_router_class`` of the deployments behind the ingress."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002 - Serve's signature
    ) -> list[list[RunningReplica]]:
        return [random.sample(candidate_replicas, len(candidate_replicas))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas are added or removed."""
        super().update_replicas(replicas)
        # Serve pickles this class by value: a global of its module would be a copy of it.
        from deployments.transport.discovery import publish

        publish((self._deployment_id.app_name, self._deployment_id.name), replicas)

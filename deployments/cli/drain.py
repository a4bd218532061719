"""``slowlens drain``: takes this Ray node out of service before what runs it is stopped, without losing a request.

In Kubernetes it runs in each pod when that is deleted. On a worker, Serve starts replacements of its replicas
elsewhere, and ends them when these run or, if there is no place, when they have answered; its HAProxy tells every
client by ``Connection: close`` to come back elsewhere. A worker that is the only one goes on until another one serves.
On the head, the work of others is waited for: nothing of this can be done without it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deployments.cli.supervise import tcp_sockets

_HEAD_RESOURCE = "node:__internal_head__"
_ESTABLISHED = "01"
_ALIVE = 0
"""`GcsNodeInfo.ALIVE`."""
_UNDER_WAY_S = 30
"""How long a head waits for workers that are to end with it to say so."""
_ANOTHER_S = 120
"""How long the only worker goes on taking requests, until another one serves that the autoscaler adds."""
_SILENT_S = 60
"""How long the control plane may not answer, as while its head is replaced, before this gives up."""
_CALL_S = 5
_EVERY_S = 0.5


class NoControlPlane(Exception):
    """The control plane does not answer, now or any more."""


@dataclass(frozen=True, slots=True)
class RayNode:
    node_id: str
    address: str
    is_head: bool
    is_draining: bool


class Cluster(Protocol):
    """What draining needs to know of a Ray cluster, and to do in it. All may raise NoControlPlane."""

    node_id: str

    def nodes(self) -> list[RayNode]:
        """Those that are alive."""
        ...

    def serves(self, node: RayNode) -> bool:
        """Whether requests to the node are answered."""
        ...

    def begin(self) -> None:
        """Have Serve move the replicas of this node and its proxy tell clients to go."""
        ...

    def keep_open(self, is_open: bool) -> None:
        """Whether the proxy of this node is to take requests although the node is drained."""
        ...

    def replicas(self) -> int:
        """How many replicas there are on this node."""
        ...

    def connections(self) -> int:
        """How many connections clients have to the proxy of this node."""
        ...


def drain(cluster: Cluster, deadline_s: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Return whether all had ended within ``deadline_s``. Raises NoControlPlane."""

    def within(limit_s: float, is_done: Callable[[], bool]) -> bool:
        until = min(clock() + limit_s, end)
        answered = clock()
        while True:
            try:
                if is_done():
                    return True
                answered = clock()
            except NoControlPlane:
                if clock() >= answered + _SILENT_S:
                    raise
            if clock() >= until:
                return False
            sleep(_EVERY_S)

    end = clock() + deadline_s
    (own,) = (one for one in cluster.nodes() if one.node_id == cluster.node_id)
    if own.is_head:
        within(_UNDER_WAY_S, lambda: any(one.is_draining for one in cluster.nodes()))
        return within(deadline_s, lambda: not any(one.is_draining for one in cluster.nodes()))

    def others() -> list[RayNode]:
        found = [one for one in cluster.nodes() if not one.is_head and one.node_id != own.node_id]
        return [one for one in found if not one.is_draining]

    def another_serves() -> bool:
        return any(cluster.serves(one) for one in others())

    def is_end_of_all() -> bool:
        return not others() and any(one.is_draining for one in cluster.nodes() if one.node_id != own.node_id)

    is_only = not another_serves() and not is_end_of_all()
    cluster.begin()
    if is_only:
        cluster.keep_open(True)
        within(_ANOTHER_S, lambda: another_serves() or is_end_of_all())
        cluster.keep_open(False)
    return within(deadline_s, lambda: cluster.replicas() == 0 and cluster.connections() == 0)


class ServeCluster:
    """The cluster that this node belongs to, by interfaces of Ray's own, as `ray drain-node` uses them."""

    def __init__(self, deadline_s: float, ports: Sequence[int]) -> None:
        import ray
        from ray._private import services
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        _wait_for_head(services.canonicalize_bootstrap_address("auto"))
        ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
        context = ray.get_runtime_context()
        self._ray: Any = ray
        self._gcs: Any = GcsClient(address=context.gcs_address)
        self._controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        self._deadline_s = deadline_s
        self._ports = ports
        self.node_id: str = context.get_node_id()

    def nodes(self) -> list[RayNode]:
        with _control_plane():
            draining = self._gcs.get_draining_nodes(timeout=_CALL_S)
            nodes = self._gcs.get_all_node_info(timeout=_CALL_S)
        return [
            RayNode(
                node_id.hex(),
                one.node_manager_address,
                _HEAD_RESOURCE in one.resources_total,
                node_id.hex() in draining,
            )
            for node_id, one in nodes.items()
            if one.state == _ALIVE
        ]

    def serves(self, node: RayNode) -> bool:
        try:
            with urllib.request.urlopen(f"http://{node.address}:{self._ports[0]}/-/healthz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def begin(self) -> None:
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

        until_ms = time.time_ns() // 10**6 + int(self._deadline_s * 1e3)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        with _control_plane():
            accepted, why_not = self._gcs.drain_node(self.node_id, reason, "slowlens drain", until_ms)
        if not accepted:
            raise NoControlPlane(f"Ray does not drain this node: {why_not}")

    def keep_open(self, is_open: bool) -> None:
        own = RayNode(self.node_id, "localhost", is_head=False, is_draining=True)
        if is_open:
            # Serve closes it once, in its next round.
            for _ in range(50):
                if not self.serves(own):
                    break
                time.sleep(0.1)
        try:
            with _control_plane():
                proxy = self._ray.get_actor(f"SERVE_PROXY_ACTOR-{self.node_id}", namespace="serve")
                self._ray.get(proxy.update_draining.remote(not is_open), timeout=_CALL_S)
        except NoControlPlane:
            # There is no proxy, or it has ended: nothing that could be open.
            return

    def replicas(self) -> int:
        with _control_plane():
            details = self._ray.get(self._controller.get_serve_instance_details.remote(), timeout=_CALL_S)
        # One that is being placed has no node.
        return sum(
            replica.get("node_id") == self.node_id
            for application in details["applications"].values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        )

    def connections(self) -> int:
        return established(self._ports)


def _wait_for_head(address: str | None) -> None:
    """ray.init would wait for ever for a head that is away. Raises NoControlPlane."""
    if not address:
        raise NoControlPlane("no Ray runs here")
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _SILENT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CALL_S).close()
        except OSError as error:
            if time.monotonic() >= until:
                raise NoControlPlane(f"the head does not answer at {address}: {error}") from None
            time.sleep(_EVERY_S)
        else:
            return


@contextmanager
def _control_plane() -> Iterator[None]:
    """What Ray raises when a head or a controller is gone has many names."""
    try:
        yield
    except Exception as error:
        raise NoControlPlane(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def established(ports: Sequence[int], folder: Path = Path("/proc/net")) -> int:
    """How many connections others have to these ports of this machine. Linux only."""
    return sum(port in ports and state == _ESTABLISHED for port, state, _ in tcp_sockets(folder))


def run(deadline_s: float, ports: Sequence[int]) -> int:
    """Return the exit status: 0 when all has ended; 1, with one line on stderr, if it has not or cannot be done."""
    # The driver that this process is needs none of it.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        is_done = drain(ServeCluster(deadline_s, ports), deadline_s, time.monotonic, time.sleep)
    except (NoControlPlane, ConnectionError, ValueError) as error:
        # ray.init raises ConnectionError where there is no Ray, ray.get_actor ValueError where there is no Serve.
        print(f"slowlens: this node was not drained: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if not is_done:
        print(f"slowlens: not all had ended after {deadline_s:.0f} s", file=sys.stderr)  # noqa: T201
    return 0 if is_done else 1

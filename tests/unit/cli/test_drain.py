"""``slowlens drain``: in which order a node is taken out of service, on made-up clusters and in virtual time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from deployments.cli.drain import NoControlPlane, RayNode, drain, established

HEAD = RayNode("head", "10.0.0.1", is_head=True, is_draining=False)
ONE = RayNode("one", "10.0.0.2", is_head=False, is_draining=False)
TWO = RayNode("two", "10.0.0.3", is_head=False, is_draining=False)


@dataclass
class MadeUp:
    """A cluster that changes as time passes: ``events`` are done when their time has come."""

    node_id: str
    there: dict[str, RayNode]
    serving: set[str]
    left: int = 1
    clients: int = 1
    now_s: float = 0
    events: list[tuple[float, Callable[[MadeUp], None]]] = field(default_factory=list)
    done: list[tuple[float, str]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        due = [one for one in self.events if one[0] <= self.now_s]
        self.events = [one for one in self.events if one[0] > self.now_s]
        for _, change in due:
            change(self)

    def nodes(self) -> list[RayNode]:
        return list(self.there.values())

    def serves(self, node: RayNode) -> bool:
        return node.node_id in self.serving

    def begin(self) -> None:
        self.done.append((self.now_s, "begin"))
        self.there[self.node_id] = replace(self.there[self.node_id], is_draining=True)

    def keep_open(self, is_open: bool) -> None:
        self.done.append((self.now_s, "open" if is_open else "closed"))

    def replicas(self) -> int:
        return self.left

    def connections(self) -> int:
        return self.clients

    def run(self, deadline_s: float = 690) -> bool:
        return drain(self, deadline_s, lambda: self.now_s, self.sleep)


def cluster(own: RayNode, *others: RayNode, serving: tuple[RayNode, ...] = ()) -> MadeUp:
    return MadeUp(own.node_id, {one.node_id: one for one in (HEAD, own, *others)}, {one.node_id for one in serving})


def all_ended(one: MadeUp) -> None:
    one.left = one.clients = 0


def no_replicas(one: MadeUp) -> None:
    one.left = 0


def test_a_worker_beside_another_is_drained_at_once_and_ends_with_its_last_connection() -> None:
    made = cluster(ONE, TWO, serving=(ONE, TWO))
    made.events = [(20, no_replicas), (50, all_ended)]

    assert made.run()
    assert made.done == [(0, "begin")]
    assert made.now_s == 50


def test_the_only_worker_serves_on_until_another_one_does() -> None:
    made = cluster(ONE, serving=(ONE,))

    def starts(one: MadeUp) -> None:
        one.there["two"] = TWO

    made.events = [(15, starts), (30, lambda one: one.serving.add("two")), (60, all_ended)]

    assert made.run()
    assert made.done == [(0, "begin"), (0, "open"), (30, "closed")]
    assert made.now_s == 60


def test_the_only_worker_does_not_wait_for_ever() -> None:
    made = cluster(ONE, serving=(ONE,))
    made.events = [(200, all_ended)]

    assert made.run()
    assert made.done == [(0, "begin"), (0, "open"), (120, "closed")]


def test_when_all_workers_end_together_none_waits_for_another() -> None:
    made = cluster(ONE, replace(TWO, is_draining=True), serving=(ONE, TWO))
    made.events = [(90, all_ended)]

    assert made.run()
    assert made.done == [(0, "begin")]


def test_a_worker_that_is_not_done_gives_up_at_its_deadline() -> None:
    made = cluster(ONE, TWO, serving=(TWO,))

    assert not made.run(deadline_s=100)
    assert made.now_s == pytest.approx(100, abs=1)


def test_the_head_outlasts_workers_that_are_drained() -> None:
    made = cluster(ONE, TWO)
    made.node_id = HEAD.node_id

    def drains(one: MadeUp) -> None:
        one.there["one"] = replace(ONE, is_draining=True)

    def has_ended(one: MadeUp) -> None:
        del one.there["one"]

    made.events = [(3, drains), (90, has_ended)]

    assert made.run()
    assert made.now_s == 90
    assert made.done == []


def test_a_head_that_is_replaced_alone_waits_for_nobody() -> None:
    made = cluster(ONE, TWO)
    made.node_id = HEAD.node_id

    assert made.run()
    assert made.now_s == pytest.approx(30, abs=1)


def test_a_head_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_is_not() -> None:
    made = cluster(ONE, TWO, serving=(ONE, TWO))
    answer = made.replicas

    def away() -> int:
        raise NoControlPlane("GetTimeoutError")

    def goes(one: MadeUp) -> None:
        one.replicas = away  # type: ignore[method-assign]

    def returns(one: MadeUp) -> None:
        one.replicas = answer  # type: ignore[method-assign]

    made.events = [(20, goes), (70, returns), (80, all_ended)]
    assert made.run()
    assert made.now_s == 80

    made = cluster(ONE, TWO, serving=(ONE, TWO))
    made.events = [(20, goes)]
    with pytest.raises(NoControlPlane):
        made.run()
    assert made.now_s == pytest.approx(80, abs=1)


def test_connections_of_clients_are_counted(tmp_path: Path) -> None:
    rest = "00000000:00000000 00:00000000 00000000     0        0 1"
    (tmp_path / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        f"   0: 00000000:1F40 00000000:0000 0A {rest}\n"  # listens on 8000
        f"   1: 0100007F:1F40 0100007F:A1B2 01 {rest}\n"  # a client of 8000
        f"   2: 0100007F:1F40 0100007F:A1B3 06 {rest}\n"  # one that is closed
        f"   3: 0100007F:A1B2 0100007F:1F40 01 {rest}\n"  # the client's own end
        f"   4: 0100007F:2328 0100007F:A1B4 01 {rest}\n"  # a client of 9000
    )

    assert established([8000, 9000], tmp_path) == 2
    assert established([8000], tmp_path) == 1


def test_where_there_is_no_ray_it_says_so() -> None:
    code = "import deployments.cli.drain as d; d._SILENT_S = 0; raise SystemExit(d.run(5, [8000]))"
    command, environment = [sys.executable, "-c", code], os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    assert result.returncode == 1
    assert "slowlens: this node was not drained: the head does not answer at " in result.stderr
    assert "Traceback" not in result.stderr

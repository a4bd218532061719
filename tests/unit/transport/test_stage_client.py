"""The client of a stage: results and failures, the choice of a replica, replicas that die, leave, or are not there."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.config import AppConfig
from deployments.errors import DeadlinePassed, InvalidField, NoReplicaReady, QueueFull, ReplicaDied, TooLarge
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import HopRecord, RequestRecord
from deployments.transport import stage_client
from deployments.transport.discovery import Address, DeploymentFailed
from deployments.transport.server import QueueState
from deployments.transport.stage_client import Progress, RetryBudget, StageClient
from tests.support.channels import HOST, SECRET, Cable, Stage, Word, on_both_loops, to_close, until
from tests.support.local import PLACEMENT, ListedReplicas


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    config = AppConfig.parse({"telemetry": {"directory": str(tmp_path)}})
    made = Telemetry("ingress", config, "model", PLACEMENT.identity)
    yield made
    made.close()


class Caller:
    """One ingress that calls a stage on behalf of HTTP requests."""

    def __init__(self, telemetry: Telemetry, no_replica_wait_ms: float = 5000) -> None:
        self._telemetry = telemetry
        self.directory = ListedReplicas()
        self.client: StageClient[Word, str] = StageClient("model", self.directory, str, telemetry, no_replica_wait_ms)
        self.client.replicas.start()
        to_close.append(self.client.replicas.close)
        self.stages: list[Stage] = []
        self.records: list[RequestRecord] = []

    async def with_stages(self, count: int, max_ongoing_requests: int = 100) -> Caller:
        """Start replicas, and wait until they are connected."""
        for _ in range(count):
            self.stages.append(await Stage(max_ongoing_requests).listen())
        self.list_all()
        await until(lambda: self.client.replicas.connected == count)
        return self

    def list_all(self) -> None:
        self.directory.list(*(stage.address(f"replica-{number}") for number, stage in enumerate(self.stages)))

    async def call(
        self, text: str, timeout_s: float = 30.0, work: int = 1, progress: Progress[int] | None = None
    ) -> str:
        with self._telemetry.request(
            method="POST", path="/", scheme="http", route="/", client="", request_id="id", headers={}
        ) as record:
            self.records.append(record)
            record.deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
            return await self.client.call(record, Word(text, work), progress)

    async def hang(self, count: int) -> list[asyncio.Task[str]]:
        """Make calls that hang, and wait until the replicas have them."""
        calls = [asyncio.ensure_future(self.call(f"hang {number}")) for number in range(count)]
        await until(lambda: sum(stage.waiting for stage in self.stages) == count)
        return calls

    async def hear_of_the_queue(self) -> None:
        """Get replies from all replicas, after they have looked at their queues again."""
        await asyncio.sleep(0.001)
        await asyncio.gather(*(self.call(f"word {number}") for number in range(20)))

    def hops(self, number: int = -1) -> list[HopRecord]:
        return [hop for hop in self.records[number].intervals if isinstance(hop, HopRecord)]


def served(caller: Caller) -> list[int]:
    return [len(stage.envelopes) for stage in caller.stages]


# --- results and failures ---


@on_both_loops
async def test_the_result_comes_back_and_the_hop_says_how_long_the_stage_had_it(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    assert await asyncio.gather(*map(caller.call, "ab")) == ["A", "B"]
    for number in (0, 1):
        (hop,) = caller.hops(number)
        assert (hop.held_ns, hop.has_reply, hop.attempt) == (7, True, 1)
        assert 0 <= hop.wait_ns < 1e9
        assert hop.left_ns


@on_both_loops
async def test_a_failure_of_the_stage_is_raised_and_not_tried_again(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    good, bad = await asyncio.gather(caller.call("a"), caller.call("bad"), return_exceptions=True)
    assert good == "A"
    assert isinstance(bad, InvalidField)
    assert bad.param == "word"
    assert sum(served(caller)) == 2


@on_both_loops
async def test_deadlines_before_and_while_waiting(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    with pytest.raises(DeadlinePassed, match="before the request was sent to the model"):
        await caller.call("a", timeout_s=-1)
    with pytest.raises(DeadlinePassed, match="while waiting for the model"):
        await caller.call("hang", timeout_s=0.01)
    await until(lambda: caller.stages[0].cancelled == ["hang"])


@on_both_loops
async def test_a_message_that_is_too_large_fails_alone(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    with pytest.raises(TooLarge, match="makes a message of"):
        await caller.call("x" * (65 * 1024 * 1024))
    assert await caller.call("a") == "A"


@on_both_loops
async def test_a_client_that_hangs_up_withdraws_its_call(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    waiting = asyncio.ensure_future(caller.call("hang"))
    await until(lambda: caller.stages[0].waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: caller.stages[0].cancelled == ["hang"])


# --- results in parts, and calls on behalf of many ---


@on_both_loops
async def test_parts_of_a_result_are_taken_as_they_come(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    taken: list[int] = []
    # More than may be on their way at once.
    assert await caller.call("spell 200", progress=Progress(int, taken.append)) == "SPELL 200"
    assert taken == list(range(200))


@on_both_loops
async def test_a_caller_that_has_enough_gets_its_reply(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    taken: list[int] = []

    def take(number: int) -> None:
        taken.append(number)
        if number == 100:
            progress.enough(3)

    progress = Progress(int, take)
    assert await caller.call("count", progress=progress) == "COUNT"
    assert set(caller.stages[0].enough) == {3}
    assert taken[:101] == list(range(101))
    progress.enough(3)


@on_both_loops
async def test_a_call_is_not_sent_again_once_a_part_was_passed_on(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    taken: list[int] = []
    begun = asyncio.ensure_future(caller.call("begins", progress=Progress(int, taken.append)))
    await until(lambda: taken)
    for stage in caller.stages:
        if stage.waiting:
            await stage.server.close()
    with pytest.raises(ReplicaDied):
        await begun
    assert (taken, sum(served(caller))) == ([0], 1)


@on_both_loops
async def test_a_call_on_behalf_of_many_has_no_hop_and_is_sent_again(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    now_ns = time.monotonic_ns()
    assert await caller.client.post("id", Word("a"), now_ns + 10**10) == "A"
    posted = asyncio.ensure_future(caller.client.post("id", Word("hang"), now_ns + 10**10))
    await until(lambda: sum(stage.waiting for stage in caller.stages) == 1)
    held = next(stage for stage in caller.stages if stage.waiting)
    other = next(stage for stage in caller.stages if not stage.waiting)
    other.let_go.set()
    await held.server.close()
    assert await posted == "HANG"
    with pytest.raises(InvalidField):
        await caller.client.post("id", Word("bad"), now_ns + 10**10)
    assert caller.records == []


# --- which replica ---


@on_both_loops
async def test_calls_go_to_the_replica_with_the_least_work(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(3)
    large = asyncio.ensure_future(caller.call("hang", work=1000))
    await until(lambda: sum(stage.waiting for stage in caller.stages) == 1)
    busy = next(stage for stage in caller.stages if stage.waiting)
    small = [asyncio.ensure_future(caller.call(f"hang {number}", work=10)) for number in range(40)]
    await until(lambda: sum(stage.waiting for stage in caller.stages) == 41)

    assert busy.waiting == 1
    assert sorted(stage.waiting for stage in caller.stages) == [1, 20, 20]
    for stage in caller.stages:
        stage.let_go.set()
    await asyncio.gather(large, *small)


@on_both_loops
async def test_calls_that_cost_the_same_are_spread(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(12)
    for number in range(240):
        await caller.call(str(number))
    assert min(served(caller)) > 3


@on_both_loops
async def test_calls_wait_in_order_when_no_replica_has_room(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1, max_ongoing_requests=1)
    (stage,) = caller.stages
    first = asyncio.ensure_future(caller.call("hang"))
    await until(lambda: stage.waiting == 1)
    order: list[str] = []
    others = []
    for text in "abcd":
        others.append(asyncio.ensure_future(caller.call(text)))
        others[-1].add_done_callback(lambda done: None if done.cancelled() else order.append(done.result()))
        await asyncio.sleep(0)
    with pytest.raises(DeadlinePassed, match="waiting for a replica of the model"):
        await caller.call("late", timeout_s=0.02)
    others[1].cancel()
    stage.let_go.set()
    await asyncio.gather(first, *others, return_exceptions=True)

    assert order == ["A", "C", "D"]
    assert served(caller) == [4]
    assert caller.hops(1)[0].wait_ns > 0


@on_both_loops
async def test_a_full_or_slow_queue_is_refused_before_the_call(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    in_a_minute = time.monotonic_ns() + int(60e9)
    caller.client.refuse_early(in_a_minute)
    for stage in caller.stages:
        stage.queue = QueueState(90_000.0)
    await caller.hear_of_the_queue()
    with pytest.raises(DeadlinePassed, match=r"the shortest queue of the model takes (90000|899\d\d) ms"):
        caller.client.refuse_early(in_a_minute)
    for stage in caller.stages:
        stage.queue = QueueState(is_full=True)
    await caller.hear_of_the_queue()
    with pytest.raises(QueueFull, match="every replica of the model is full"):
        caller.client.refuse_early(in_a_minute)
    caller.stages[0].queue = QueueState()
    await caller.hear_of_the_queue()
    caller.client.refuse_early(in_a_minute)


# --- replicas that hang ---


async def with_a_cable(telemetry: Telemetry) -> tuple[Caller, Cable]:
    """Two replicas, the first of which is behind a cable that can be frozen, as its process can."""
    caller = Caller(telemetry)
    caller.stages += [await Stage().listen(), await Stage().listen()]
    cable = await Cable(caller.stages[0].port).listen()
    first, second = (stage.address(f"replica-{number}") for number, stage in enumerate(caller.stages))
    caller.directory.list(replace(first, port=cable.port), second)
    await until(lambda: caller.client.replicas.connected == 2)
    return caller, cable


@on_both_loops
async def test_calls_of_a_replica_that_is_silent_go_to_another(telemetry: Telemetry) -> None:
    caller, cable = await with_a_cable(telemetry)
    calls = await caller.hang(10)
    held = caller.stages[0].waiting
    caller.stages[1].let_go.set()
    cable.freeze()
    frozen_at = time.monotonic()

    assert await asyncio.gather(*calls) == [f"HANG {number}" for number in range(10)]
    assert time.monotonic() - frozen_at < 3
    assert len(caller.stages[1].envelopes) == 10
    assert Counter(len(caller.hops(number)) for number in range(10)) == {1: 10 - held, 2: held}
    # It is left out, and taken back when it answers again.
    before = served(caller)[0]
    await asyncio.gather(*map(caller.call, "abcdef"))
    assert served(caller)[0] == before
    cable.thaw()
    await until(lambda: caller.client.replicas.connected == 2)
    await asyncio.gather(*map(caller.call, "abcdef"))
    assert served(caller)[0] > before


@on_both_loops
async def test_who_was_held_up_itself_gives_up_nobody(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    (call,) = await caller.hang(1)
    # Longer than a replica may be silent: its answers are there, but not read.
    time.sleep(2.6)  # noqa: ASYNC251
    await asyncio.sleep(0.1)
    for stage in caller.stages:
        stage.let_go.set()
    assert await call == "HANG 0"
    assert len(caller.hops(0)) == 1


@on_both_loops
async def test_the_only_replica_is_waited_for_however_silent(telemetry: Telemetry) -> None:
    caller, cable = await with_a_cable(telemetry)
    await caller.stages[1].server.close()
    caller.directory.list(replace(caller.stages[0].address("replica-0"), port=cable.port))
    (call,) = await caller.hang(1)
    cable.freeze()
    await asyncio.sleep(2.7)
    assert not call.done()
    caller.stages[0].let_go.set()
    cable.thaw()
    assert await call == "HANG 0"


@on_both_loops
async def test_a_replica_whose_device_is_stuck_gets_no_call_while_there_is_another(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    await caller.hang(2)
    caller.stages[0].queue = QueueState(is_stuck=True)
    # The stuck replica replies to nothing; it answers pings.
    await asyncio.sleep(0.6)
    before = served(caller)[0]
    await asyncio.gather(*(caller.call(f"word {number}") for number in range(20)))
    assert served(caller)[0] == before
    for stage in caller.stages:
        stage.let_go.set()


# --- replicas that die or leave ---


@on_both_loops
async def test_a_call_whose_replica_dies_is_sent_to_another(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    calls = await caller.hang(20)
    dying, other = caller.stages
    other.let_go.set()
    held = dying.waiting
    await dying.server.close()

    assert await asyncio.gather(*calls) == [f"HANG {number}" for number in range(20)]
    attempts = Counter(len(caller.hops(number)) for number in range(20))
    assert attempts == {1: 20 - held, 2: held}
    first, second = next(caller.hops(n) for n in range(20) if len(caller.hops(n)) == 2)
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.fault is not None
    assert first.fault.error_type == "replica_died"
    assert (second.fault, second.has_reply) == (None, True)
    assert first.ended_ns == second.started_ns
    assert first.span_id != second.span_id


@on_both_loops
async def test_a_call_that_two_replicas_died_of_is_not_sent_again(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(3)
    call = asyncio.ensure_future(caller.call("hang"))
    for _ in range(2):
        await until(lambda: sum(stage.waiting for stage in caller.stages) == 1)
        await next(stage for stage in caller.stages if stage.waiting).server.close()
    with pytest.raises(ReplicaDied, match="the model replica died while handling this request"):
        await call
    assert sorted(served(caller)) == [0, 1, 1]


def test_a_budget_fills_with_calls_up_to_its_reserve() -> None:
    budget = RetryBudget(reserve=2, per_call=0.5)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.add()
    assert not budget.take()
    budget.add()
    assert budget.take()
    for _ in range(100):
        budget.add()
    assert [budget.take() for _ in range(3)] == [True, True, False]


@on_both_loops
async def test_without_budget_the_death_of_a_replica_is_told(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_client.RetryBudget, "take", lambda _: False)
    caller = await Caller(telemetry).with_stages(2)
    call = asyncio.ensure_future(caller.call("hang"))
    await until(lambda: sum(stage.waiting for stage in caller.stages) == 1)
    await next(stage for stage in caller.stages if stage.waiting).server.close()
    with pytest.raises(ReplicaDied):
        await call


@on_both_loops
async def test_a_call_waits_for_the_replica_that_replaces_a_dead_one(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    (dying,) = caller.stages
    call = asyncio.ensure_future(caller.call("hang"))
    await until(lambda: dying.waiting == 1)
    await dying.server.close()
    await until(lambda: not caller.client.replicas.is_ready)
    caller.stages.append(await Stage().listen())
    caller.stages[1].let_go.set()
    caller.directory.list(caller.stages[1].address("replica-new"))

    assert await call == "HANG"
    assert [hop.attempt for hop in caller.hops()] == [1, 2]


@on_both_loops
async def test_a_replica_that_leaves_gets_no_call_and_none_of_its_calls_fails(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    leaving, staying = caller.stages
    calls = await caller.hang(20)
    had = leaving.waiting
    drain = asyncio.ensure_future(leaving.server.drain())
    more = [asyncio.ensure_future(caller.call(f"word {number}")) for number in range(20)]
    await asyncio.gather(*more)
    leaving.let_go.set()
    staying.let_go.set()
    await asyncio.gather(*calls)
    await drain

    assert had > 0
    assert {len(caller.hops(number)) for number in range(40)} == {1}
    before = len(leaving.envelopes)
    await asyncio.gather(*(caller.call(f"word {number}") for number in range(20)))
    assert len(leaving.envelopes) == before


@on_both_loops
async def test_a_replica_that_serve_no_longer_lists_finishes_its_calls(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(2)
    removed, staying = caller.stages
    calls = await caller.hang(20)
    caller.directory.list(staying.address("replica-1"))
    await asyncio.gather(*(caller.call(f"word {number}") for number in range(20)))
    assert removed.waiting == len(removed.envelopes)
    removed.let_go.set()
    staying.let_go.set()
    await asyncio.gather(*calls)
    await until(lambda: removed.server.callers == 0)


@on_both_loops
async def test_a_lost_connection_to_a_listed_replica_is_made_anew(telemetry: Telemetry) -> None:
    caller = await Caller(telemetry).with_stages(1)
    (stage,) = caller.stages
    port = stage.port
    await stage.server.close()
    await until(lambda: not caller.client.replicas.is_ready)
    caller.stages[0] = await Stage().listen(port)
    assert await caller.call("word") == "WORD"


# --- replicas that are not there ---


@on_both_loops
async def test_the_first_call_wakes_the_stage_and_waits(telemetry: Telemetry) -> None:
    caller = Caller(telemetry)
    assert not caller.client.replicas.is_ready
    calls = [asyncio.ensure_future(caller.call(text)) for text in "abc"]
    await until(lambda: caller.directory.wakes == 1)
    await caller.with_stages(1)

    assert await asyncio.gather(*calls) == ["A", "B", "C"]
    assert caller.directory.wakes == 1
    assert all(envelope.waited_ns > 0 for envelope in caller.stages[0].envelopes)


@on_both_loops
async def test_a_call_wakes_the_stage_while_its_last_replica_is_leaving(telemetry: Telemetry) -> None:
    caller = Caller(telemetry)
    await caller.with_stages(1)
    held = asyncio.ensure_future(caller.call("hang 1"))
    await until(lambda: caller.stages[0].waiting == 1)
    caller.directory.list()
    call = asyncio.ensure_future(caller.call("word"))
    await until(lambda: caller.directory.wakes == 1)
    newer = await Stage().listen()
    caller.directory.list(newer.address("replica-2"))

    assert await call == "WORD"
    caller.stages[0].let_go.set()
    assert await held == "HANG 1"


@on_both_loops
async def test_a_stage_that_stays_without_a_replica_is_503(telemetry: Telemetry) -> None:
    caller = Caller(telemetry, no_replica_wait_ms=20)
    with pytest.raises(NoReplicaReady, match="no replica of the model is ready"):
        await caller.call("word")
    with pytest.raises(DeadlinePassed):
        await caller.call("word", timeout_s=0.005)


@on_both_loops
async def test_a_deployment_that_failed_is_503_at_once(telemetry: Telemetry) -> None:
    caller = Caller(telemetry, no_replica_wait_ms=60_000)
    caller.directory.error = DeploymentFailed()
    with pytest.raises(NoReplicaReady, match="the model failed to deploy"):
        await caller.call("word")


@on_both_loops
async def test_a_failing_wake_does_not_fail_the_call(telemetry: Telemetry) -> None:
    caller = Caller(telemetry)
    caller.directory.error = RuntimeError("the controller is gone")
    call = asyncio.ensure_future(caller.call("word"))
    await until(lambda: caller.directory.wakes == 1)
    await caller.with_stages(1)
    assert await call == "WORD"


@on_both_loops
async def test_a_replica_that_cannot_be_reached_is_named(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    stage = await Stage().listen()
    await stage.server.close()
    caller = Caller(telemetry, no_replica_wait_ms=200)
    caller.directory.list(stage.address())
    with pytest.raises(NoReplicaReady, match="no replica of the model can be reached") as told:
        await caller.call("word")
    assert HOST not in str(told.value)
    assert f"replica-1 at {HOST}:{stage.port}: cannot be reached" in caplog.text
    assert SECRET not in caplog.text


@on_both_loops
async def test_a_replica_of_another_secret_or_version_is_not_used(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await Caller(telemetry, no_replica_wait_ms=200).with_stages(1)
    newer = await Stage(versions=(9,)).listen()
    right = caller.stages[0].address("replica-0")
    wrong = Address("replica-2", HOST, caller.stages[0].port, "another secret")
    caller.directory.list(right, newer.address("replica-1"), wrong)
    assert await asyncio.gather(*(caller.call(f"word {number}") for number in range(10)))
    caller.directory.list(newer.address("replica-1"), wrong)
    with pytest.raises(NoReplicaReady, match="can be reached"):
        await caller.call("word")
    assert "the replica does not know the secret" in caplog.text
    assert "the caller speaks the versions [1, 2]" in caplog.text

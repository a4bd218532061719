"""Retroactive sampling: what is kept is whole, with those who shared its runs, and stands for everything."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext, TraceFlags

from deployments.errors import InvalidJson, ModelFailed
from deployments.messages import Carrier, Envelope
from deployments.telemetry.carrier import to_carrier
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    Membership,
    ModelLoadRecord,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    TokenizeRecord,
)
from deployments.telemetry.sampling.retention import Keep, Retention
from deployments.telemetry.sampling.rule import KeepRule, Latencies

MS, S = 10**6, 10**9
RUNS = itertools.count(10**9)


def context(trace_id: int, span_id: int = 1) -> SpanContext:
    return SpanContext(trace_id, span_id, False, TraceFlags(TraceFlags.SAMPLED))


def root(
    trace_id: int, latency_ms: float = 10.0, *, failed: Exception | None = None, by_caller: bool = False
) -> RequestRecord:
    parent = context(trace_id, 9) if by_caller else None
    record = RequestRecord(context(trace_id), parent, f"r{trace_id}", "POST", "/", "http", "/v1/embeddings", "", 0)
    record.ended_ns = round(latency_ms * MS)
    record.fault = Fault.of(failed) if failed is not None else None
    return record


def envelope(trace_id: int) -> Envelope:
    return Envelope(to_carrier(context(trace_id), 1), f"r{trace_id}", 0, 60 * S, 0)


def run(*trace_ids: int) -> BatchRecord:
    members = [Membership(context(trace_id, 2), 0, 0, 0, 0) for trace_id in trace_ids]
    return BatchRecord(context(next(RUNS), 3), 0, len(members), 1, 1, "full", 0, [0], members)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Cluster:
    """The retentions of all stages, which tell each other what they keep."""

    clock: Clock = field(default_factory=Clock)
    slowest: float = 0.05
    one_in: int = 10**6
    written: dict[str, list[object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = KeepRule(self.slowest, self.one_in, self.clock)
        self.stages = {
            name: Retention(60.0, rule if name == "ingress" else None, self.clock)
            for name in ("ingress", "tokenizer", "model", "postprocessor")
        }
        self.written = {name: [] for name in self.stages}

    def put(self, stage: str, record: object) -> None:
        self.written[stage] += self.stages[stage].take(record)

    def settle(self, times: int = 6) -> None:
        """Let every stage tell the others, as often as word may have to go around."""
        for _ in range(times):
            for name, stage in self.stages.items():
                self.written[name] += stage.settle()
                told = stage.told()
                others = ("ingress",) if name != "ingress" else ("tokenizer", "model", "postprocessor")
                for other in others:
                    self.stages[other].ask(told)

    def request(self, record: RequestRecord, *, cold: bool = False) -> None:
        trace_id = record.context.trace_id
        self.put("tokenizer", TokenizeRecord(envelope(trace_id)))
        self.put("model", PredictRecord(envelope(trace_id), load=context(7) if cold else None))
        self.put("postprocessor", PostprocessRecord(envelope(trace_id)))
        self.put("ingress", record)

    def kept(self, stage: str) -> Counter[int]:
        found: Counter[int] = Counter()
        for record in self.written[stage]:
            if isinstance(record, RequestRecord):
                found[record.context.trace_id] += 1
            elif not isinstance(record, BatchRecord):
                found[int(record.carrier.traceparent.split("-")[1], 16)] += 1  # type: ignore[attr-defined]
        return found

    def runs(self) -> list[set[int]]:
        runs = [record for record in self.written["model"] if isinstance(record, BatchRecord)]
        return [{member.context.trace_id for member in one.members} for one in runs]


def usual(cluster: Cluster, count: int = 120, start: int = 1000) -> None:
    """Requests that are nothing special, so that it is known what is slow."""
    for trace_id in range(start, start + count):
        cluster.request(root(trace_id, 10.0 + trace_id % 7))
    cluster.settle()


@pytest.mark.parametrize(
    "record",
    [
        root(1, 500.0),
        root(1, failed=ModelFailed("the model failed")),
        root(1, by_caller=True),
    ],
    ids=["slow", "failed", "sampled by its caller"],
)
def test_a_request_that_matters_is_kept_in_every_stage(record: RequestRecord) -> None:
    cluster = Cluster()
    usual(cluster)
    before = {stage: cluster.kept(stage) for stage in cluster.stages}
    cluster.request(record)
    cluster.request(root(2, 8.0))
    cluster.settle()

    for stage in cluster.stages:
        assert cluster.kept(stage) - before[stage] == {1: 1}, stage
    assert record.weight == 1


def test_a_request_that_waited_for_a_load_is_kept() -> None:
    cluster = Cluster()
    usual(cluster)
    record = root(1, 8.0)
    cluster.request(record, cold=True)
    cluster.settle()
    assert all(cluster.kept(stage)[1] == 1 for stage in cluster.stages)
    assert record.weight == 1


def test_the_mistakes_of_a_caller_do_not_matter() -> None:
    cluster = Cluster()
    usual(cluster)
    record = root(1, 8.0, failed=InvalidJson("not JSON"))
    assert record.fault is not None
    record.fault.is_callers = True
    cluster.request(record)
    cluster.settle()
    assert not any(cluster.kept(stage)[1] for stage in cluster.stages)


def test_those_who_shared_its_run_are_kept_and_nobody_else() -> None:
    cluster = Cluster()
    usual(cluster)
    for members in ((1, 2, 3), (3, 4), (5, 6)):
        cluster.put("model", run(*members))
    records = {trace_id: root(trace_id, 500.0 if trace_id == 1 else 8.0) for trace_id in range(1, 7)}
    # The slow one ends first: the others are kept although their requests have not ended.
    for trace_id in (1, 2, 3, 4, 5, 6):
        cluster.request(records[trace_id])
        cluster.settle()

    for stage in cluster.stages:
        kept = cluster.kept(stage)
        assert [kept[trace_id] for trace_id in range(1, 7)] == [1, 1, 1, 0, 0, 0], stage
    # Their own runs are kept, whoever else was in them.
    assert [members for members in cluster.runs() if 1 in members or 3 in members] == [{1, 2, 3}, {3, 4}]
    assert [records[trace_id].weight for trace_id in range(1, 4)] == [1, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_what_is_kept_is_whole_in_any_order(chance: random.Random) -> None:
    """Runs, ends and words to the others in any order."""
    cluster = Cluster(one_in=7)
    usual(cluster)
    shared = [sorted(chance.sample(range(1, 21), chance.randint(1, 4))) for _ in range(12)]
    slow = set(chance.sample(range(1, 21), 2))
    records = {n: root(n, 900.0 if n in slow else 8.0) for n in range(1, 21)}
    todo: list[tuple[str, object]] = [("model", run(*members)) for members in shared]
    todo += [("model", PredictRecord(envelope(n), load=context(7) if n == 20 else None)) for n in records]
    todo += [("tokenizer", TokenizeRecord(envelope(n))) for n in records]
    todo += [("ingress", record) for record in records.values()]
    chance.shuffle(todo)
    for stage, record in todo:
        cluster.put(stage, record)
        if chance.random() < 0.3:
            cluster.settle(1)
    cluster.settle()

    causes = {n for n in records if n in slow or n % 7 == 0 or n == 20}
    neighbours = {n for members in shared if causes & set(members) for n in members} - causes
    for stage in ("ingress", "tokenizer", "model"):
        kept = cluster.kept(stage)
        assert {n for n in records if kept[n]} == causes | neighbours
        assert set(kept.values()) == {1}, "nothing is written twice"
    runs = [members for members in cluster.runs() if max(members) < 1000]
    assert sorted(map(sorted, runs)) == sorted(m for m in shared if (causes | neighbours) & set(m))
    own = causes - {20}
    assert {n: records[n].weight for n in own} == {n: 7 if n % 7 == 0 and n not in slow else 1 for n in own}
    # That it waited for a load may become known only after it was written as a neighbour.
    assert records[20].weight in ((1, 0) if 20 not in slow else (1,))
    assert {records[n].weight for n in neighbours} <= {0}


def test_the_weights_add_up_to_all_requests() -> None:
    cluster, chance = Cluster(one_in=50), random.Random(3)
    total, most = 8_000, []
    for _ in range(total):
        record = root(chance.getrandbits(120) + 1, chance.lognormvariate(3, 0.5))
        most.append(record)
        cluster.put("ingress", record)
        cluster.settle(1)
    kept = [record for record in cluster.written["ingress"] if isinstance(record, RequestRecord)]

    assert len(kept) < total * 0.15
    assert sum(record.weight or 0 for record in kept) == pytest.approx(total, rel=0.1)
    # Every one of the slowest hundredth is there.
    slowest = sorted(most, key=lambda record: -record.ended_ns)[: total // 100]
    ids = {record.context.trace_id for record in kept}
    assert all(record.context.trace_id in ids for record in slowest)


def test_what_is_slow_changes_with_the_route_and_with_time() -> None:
    clock = Clock()
    latencies = Latencies(clock)
    assert latencies.percentile_ns(0.5) == 0, "nothing is known yet"
    for number in range(1000):
        latencies.add(number * MS)
    assert latencies.percentile_ns(0.95) == pytest.approx(950 * MS, rel=0.05)
    for _ in range(3):
        clock.now_s += 61
        for _ in range(1000):
            latencies.add(5 * MS)
    assert latencies.percentile_ns(0.95) == pytest.approx(5 * MS, rel=0.05)


def test_records_are_let_go_when_they_are_old_and_when_there_are_too_many() -> None:
    clock = Clock()
    held = Retention(10.0, None, clock, max_held=100)
    for trace_id in range(1, 51):
        assert list(held.take(TokenizeRecord(envelope(trace_id)))) == []
    clock.now_s = 11.0
    assert list(held.settle()) == []
    held.ask([Keep(1, is_cause=True)])
    assert list(held.settle()) == [], "it is gone"
    assert held.let_go == 0

    for trace_id in range(100, 350):
        list(held.take(TokenizeRecord(envelope(trace_id))))
    list(held.settle())
    assert held.let_go == 150
    held.ask([Keep(349, is_cause=True)])
    assert len(list(held.settle())) == 1


def test_what_belongs_to_no_request_is_written_at_once() -> None:
    load = ModelLoadRecord(context(1), 0)
    unsampled = TokenizeRecord(Envelope(Carrier(f"00-{1:032x}-{1:016x}-00", ""), "r", 0, S, 0))
    held = Retention(10.0)
    assert list(held.take(load)) == [load]
    assert list(held.take(unsampled)) == [unsampled], "which has no spans"

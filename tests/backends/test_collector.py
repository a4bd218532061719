"""A Collector with the shipped configuration behind real stages: what it keeps, and what it loses when it ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.cli.main import main
from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.open import source_at
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import survey
from deployments.telemetry import names
from tests.backends.running import Jaeger, collector, get, jaeger
from tests.backends.test_sampled import window
from tests.backends.traffic import LONG, ORDINARY, POISON, AllSpans, application, send

TEXTS = ([ORDINARY] * 20 + [POISON] + [ORDINARY] * 25 + [LONG]) * 6
RATE = 45.0
SINCE_NS = 600 * 10**9
KILLED = 3_000


@dataclass
class Ended:
    """After SIGTERM to the Collector in the midst of requests, and a second one that sent what waited on disk."""

    arrived: dict[str, list[Span]]
    """By trace: every span that the first one had got."""
    store: Jaeger
    exemplars: set[str]
    """The traces that metrics of the requests led to, before."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    folder = tmp_path_factory.mktemp("ended")
    receiver = AllSpans(folder / "arrived.jsonl")
    exemplars: set[str] = set()

    async def drive() -> None:
        tail = {"sampling": {"mode": "tail"}}
        async with application(running.endpoint, monkeypatch, telemetry=tail) as client:
            requests = asyncio.create_task(send(client, TEXTS, RATE))
            await asyncio.sleep(len(TEXTS) / RATE * 0.7)
            text = await asyncio.to_thread(get, running.metrics, Accept="application/openmetrics-text")
            exemplars.update(re.findall(r'# \{[^}]*trace_id="([0-9a-f]{32})"', text.decode()))
            await asyncio.to_thread(running.stop)
            await requests

    with jaeger(folder) as store, pytest.MonkeyPatch.context() as monkeypatch:
        all_to = receiver.grpc_endpoint.removeprefix("http://")
        with collector(folder, store.endpoint, all_to=all_to) as running:
            asyncio.run(drive())
        with collector(folder, store.endpoint) as second:
            second.drained()
        receiver.close()
        arrived: dict[str, list[Span]] = defaultdict(list)
        for span in TraceFiles(folder / "arrived.jsonl").read():
            arrived[span.trace_id].append(span)
        yield Ended(arrived, store, exemplars)


def test_every_failed_and_slow_trace_that_had_arrived_is_stored_whole(ended: Ended) -> None:
    special = {
        trace_id
        for trace_id, spans in ended.arrived.items()
        for span in spans
        if span.name == names.PREDICT and (span.failed or span.ms >= 500)
    }
    assert len(special) >= 5
    source = source_at(ended.store.url)
    for trace_id in special:
        assert {span.key for span in source.trace(trace_id)} == {span.key for span in ended.arrived[trace_id]}


def test_runs_are_kept_with_their_requests(ended: Ended) -> None:
    source = source_at(ended.store.url)
    found = survey(source.roots(time.time_ns() - SINCE_NS), 0.05)
    spans = list(source.spans(found))
    runs = {span.trace_id: span for span in spans if span.name == names.BATCH_FORWARD}
    wanted = {
        trace_id
        for span in spans
        if span.name == names.FORWARD_PASS and span.trace_id in found.trace_ids_to_read
        for trace_id, _ in span.links
        if trace_id in ended.arrived
    }
    idle = [run for run in runs.values() if not any(trace_id in found.known for trace_id, _ in run.links)]

    assert found.sample.kept < len(TEXTS) / 2
    # That of a request which was slow for other reasons than its run may be missing.
    assert len(wanted - runs.keys()) <= len(wanted) / 10
    assert len(idle) <= len(found.known) / 4


def test_exemplars_lead_to_traces_that_are_kept(ended: Ended) -> None:
    source = source_at(ended.store.url)
    # Spans of the last second were still in the replicas.
    arrived = ended.exemplars & ended.arrived.keys()
    assert len(arrived) >= 3
    assert {span.trace_id for span in source.traces(arrived)} == arrived


def test_what_a_killed_collector_forgot_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = window(KILLED)
    third = len(every) // 3
    with jaeger(tmp_path) as store:
        with collector(tmp_path, store.endpoint) as running:
            running.take(every[:third])
            running.settle()
            running.take(every[third : 2 * third])
            running.kill()
        with collector(tmp_path, store.endpoint) as running:
            running.take(every[2 * third :])
            running.settle()
        assert main(["why", "--source", store.url, "--since", "15m"]) == 0
    found = re.search(
        r"of (\d+) requests that the ingress counted, the traces of about (\d+) are missing",
        " ".join(capsys.readouterr().out.split()),
    )
    assert found is not None
    assert int(found[1]) == pytest.approx(KILLED, rel=0.03)
    assert int(found[2]) == pytest.approx(KILLED / 3, rel=0.25)

"""One target per node: real sockets and a real port, several targets in one process."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families

from deployments.telemetry import metrics
from deployments.telemetry.export.prometheus import PrometheusTarget
from deployments.telemetry.export.prometheus_names import series
from deployments.telemetry.measures import Measures
from tests.support.process import ROOT


class Process:
    """A replica of the ingress, as far as its metrics go."""

    def __init__(self, port: int, folder: Path, number: int) -> None:
        self.target = PrometheusTarget("127.0.0.1", port, folder)
        reader: MetricReader = self.target.reader
        resource = Resource({"service.name": "slowlens.ingress", "service.instance.id": f"replica-{number}"})
        self.provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self.measures = Measures(self.provider.get_meter("slowlens"), "ingress", "small")

    def count(self, amount: int) -> None:
        self.measures.count(metrics.REQUESTS, amount, {"outcome": "ok"})
        self.measures.flush()

    def close(self) -> None:
        self.target.close()
        self.provider.shutdown()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def processes(port: int, tmp_path: Path) -> Iterator[list[Process]]:
    started = [Process(port, tmp_path / "node", number) for number in range(3)]
    yield started
    for one in started:
        one.close()


def scrape(port: int, path: str = "/metrics") -> str:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except HTTPError:
            raise
        except (URLError, ConnectionError):
            continue


def value(text: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """The series that are not zero."""
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.value
    }


def reading(number: float) -> list[tuple[float, dict[str, str | int]]]:
    return [(number, {"model": "small"})]


LABELS = (("model", "small"), ("outcome", "ok"), ("service_name", "slowlens.ingress"))
REQUESTS = series(metrics.REQUESTS)


def test_a_node_is_one_target_without_ids(port: int, processes: list[Process]) -> None:
    for number, one in enumerate(processes, start=1):
        one.count(number)
        one.measures.gauge(metrics.QUEUE_DEPTH, partial(reading, number))
        one.measures.gauge(metrics.QUEUE_AGE, partial(reading, 10 * number))
        one.measures.record(metrics.LATENCY, 7.0, Context(), {"outcome": "ok"})
    text = scrape(port)

    assert value(text, REQUESTS) == {LABELS: 6.0}
    assert value(text, f"{series(metrics.LATENCY)}_count") == {LABELS: 3.0}
    assert value(text, f"{series(metrics.LATENCY)}_bucket")[tuple(sorted((*LABELS, ("le", "10"))))] == 3.0
    assert list(value(text, series(metrics.QUEUE_DEPTH)).values()) == [6.0]
    assert list(value(text, series(metrics.QUEUE_AGE)).values()) == [30.0], "of ages the highest"
    assert "replica-" not in text
    with pytest.raises(HTTPError, match="404"):
        scrape(port, "/")


def test_counters_do_not_fall_when_a_process_leaves_and_another_takes_the_port(
    port: int, processes: list[Process]
) -> None:
    for one in processes:
        one.count(5)
    assert value(scrape(port), REQUESTS) == {LABELS: 15.0}
    processes[0].close()
    assert value(scrape(port), REQUESTS) == {LABELS: 15.0}
    processes[1].count(1)
    processes[1].close()
    assert value(scrape(port), REQUESTS) == {LABELS: 16.0}


_REPLICA = """
import sys, time
from pathlib import Path
from tests.unit.telemetry.test_prometheus import Process

Process(int(sys.argv[1]), Path(sys.argv[2]), 9).count(5)
print("counted", flush=True)
time.sleep(60)
"""


def test_a_process_that_was_killed_is_remembered_as_it_was_last_seen(
    port: int, processes: list[Process], tmp_path: Path
) -> None:
    folder = tmp_path / "node"
    for one in processes:
        one.count(5)
    before = value(scrape(port), REQUESTS)
    command = [sys.executable, "-c", _REPLICA, str(port), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as replica:
        assert replica.stdout is not None
        assert replica.stdout.readline() == b"counted\n"
        with_it = value(scrape(port), REQUESTS)
        replica.kill()
    texts = [scrape(port) for _ in range(3)]

    assert (before, with_it) == ({LABELS: 15.0}, {LABELS: 20.0})
    assert [value(text, REQUESTS) for text in texts] == [{LABELS: 20.0}] * 3
    assert len(list(folder.glob("*.last"))) == 1


def test_many_that_are_gone_are_put_together(port: int, tmp_path: Path) -> None:
    for number in range(12):
        one = Process(port, tmp_path / "node", number)
        one.count(2)
        one.close()
    last = Process(port, tmp_path / "node", 99)
    assert value(scrape(port), REQUESTS) == {LABELS: 24.0}
    assert value(scrape(port), REQUESTS) == {LABELS: 24.0}
    assert len(list((tmp_path / "node").glob("*.last"))) == 1
    last.close()


def test_a_folder_that_others_may_write_is_not_used(
    port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    one = Process(port, folder, 1)
    one.close()

    assert "must be a folder of this user alone" in caplog.text
    assert list(folder.iterdir()) == []

"""What operators are told of decisions, and that it ends with the policy."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from deployments.autoscaling.announce import Announcement, start_announcing
from deployments.autoscaling.decide import Goal, Memory, Observation, decide
from deployments.autoscaling.report import LoadReport
from deployments.telemetry import decisions

MADE = decide(Observation(0, 1, 1, (LoadReport(throughput=10, demand=3.0),)), Memory(), Goal(0.5))
ANNOUNCEMENT = Announcement("slowlens", "Model", 1, 2, 10, 500.0, MADE)


class Owner:
    """Stands for a policy."""


class Telemetry:
    def __init__(self, fails: bool = False) -> None:
        self.taken: list[tuple[Any, bool]] = []
        self.forgotten: list[tuple[str, str]] = []
        self._fails = fails

    def take(self, record: Any, is_news: bool) -> None:
        if self._fails:
            raise OSError("disk")
        self.taken.append((record, is_news))

    def forget(self, application: str, deployment: str) -> None:
        self.forgotten.append((application, deployment))


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def announcing_threads() -> int:
    return sum(thread.name == "slowlens-autoscaling" for thread in threading.enumerate())


def announce_once(*, is_news: bool) -> None:
    """Announce for an owner, which is gone at the end; return when the thread has ended."""
    before = announcing_threads()
    owner = Owner()
    start_announcing(owner, None)(ANNOUNCEMENT, is_news)
    del owner
    gc.collect()
    wait_until(lambda: announcing_threads() <= before)


def test_decisions_are_exported_until_the_policy_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry()
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(decisions, "decision_telemetry", lambda *_: telemetry)
    with caplog.at_level("INFO", "slowlens.autoscaling"):
        announce_once(is_news=True)

    ((record, is_news),) = telemetry.taken
    assert is_news
    assert record.stated == ANNOUNCEMENT.stated()
    assert (record.application, record.deployment, record.seen_unix_ns, record.decided_unix_ns) == (
        "slowlens",
        "Model",
        1,
        2,
    )
    assert telemetry.forgotten == [("slowlens", "Model")]
    assert "Model: 1 -> 4 replicas (demand, 4 needed)" in caplog.text


def test_a_decision_that_is_no_news_is_not_logged_and_a_failed_export_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(decisions, "decision_telemetry", lambda *_: Telemetry(fails=True))
    with caplog.at_level("INFO", "slowlens.autoscaling"):
        announce_once(is_news=False)

    assert "Model: 1 -> 4" not in caplog.text
    assert "a decision could not be exported: OSError('disk')" in caplog.text


def test_without_telemetry_decisions_are_still_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> Any:
        raise RuntimeError("Ray is not here")

    monkeypatch.setattr(ray, "get_runtime_context", unavailable)
    with caplog.at_level("INFO", "slowlens.autoscaling"):
        announce_once(is_news=True)

    assert "decisions are only logged, not exported: RuntimeError('Ray is not here')" in caplog.text
    assert "Model: 1 -> 4 replicas" in caplog.text

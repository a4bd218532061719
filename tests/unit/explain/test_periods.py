"""What takes longer than before: within a window, and compared with another period."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.explain.options import against
from deployments.explain.periods import moment_of
from deployments.explain.traces.otlp import Span
from deployments.explain.verdict import judge
from tests.support.made import otlp, request
from tests.unit.explain.test_verdict import at_random, queued, read, verdict

Odd = Callable[[int, random.Random], dict[str, Any]]
S = 10**18
"""When the first request comes in."""


def traffic(odd: Odd = lambda *_: {}, count: int = 400, seed: int = 1) -> list[Span]:
    """Ten requests a second that wait for hardly anything, except as ``odd`` overrides by number."""
    chance, spans = random.Random(seed), list[Span]()
    for number in range(count):
        usual = {"tokens": chance.randint(5, 15), "busy": chance.random() * 2, "there": 1 + chance.random()}
        spans += request(number, number * 100.0, **usual | odd(number, chance))
    return spans


def since(start: int, **changed: Any) -> Odd:
    return lambda number, _: changed if number >= start else {}


@pytest.mark.parametrize("start", [100, 200, 300])
@pytest.mark.parametrize(
    ("cause", "changed"),
    [
        ("device_contention", {"contention": 7.0}),
        ("cpu_starvation", {"contention": 10.0, "starved": 10.0}),
        ("transit", {"there": 9.0, "back": 9.0}),
        ("long_input", {"tokens": 50}),
        ("tokenization", {"tokenize": 15.0}),
        ("postprocessing", {"postprocess": 15.0}),
        ("padding", {"padding": 30}),
        ("slow_upload", {"upload": 15.0}),
    ],
)
def test_a_slowdown_that_stays_has_its_moment_and_its_cause(cause: str, changed: dict[str, Any], start: int) -> None:
    found = verdict(traffic(since(start, **changed)))

    assert [finding.cause for finding in found.findings] == [cause]
    assert found.change is not None
    assert list(found.change.increases) == [cause]
    # A bin has seven requests.
    assert abs((found.change.moment_ns - S) / 1e8 - start) <= 8
    assert found.change.p50_ms[1] > 1.25 * found.change.p50_ms[0]


def test_a_burst_and_an_improvement_are_no_change() -> None:
    burst = traffic(lambda number, _: {"busy": 40.0} if 150 <= number < 220 else {})
    assert verdict(burst).change is None
    assert [finding.cause for finding in verdict(burst).findings] == ["device_queue"]
    assert verdict(traffic(lambda number, _: {"busy": 40.0} if number < 200 else {})).change is None
    assert verdict(traffic()).change is None
    assert verdict(traffic(since(20, busy=40.0), count=40)).change is None, "of few requests nothing can be said"


def test_routes_of_different_speed_are_no_change() -> None:
    """From the middle on, most requests go to a route on which they always take longer."""

    def odd(number: int, chance: random.Random) -> dict[str, Any]:
        is_slow = chance.random() < (0.9 if number >= 200 else 0.1)
        return {"tokens": 100, "route": "/predict"} if is_slow else {}

    assert verdict(traffic(odd)).change is None


@pytest.mark.parametrize("seed", range(20))
def test_what_random_arrivals_do_is_no_change(seed: int) -> None:
    rate = (0.5, 0.7, 0.8, 0.85)[seed % 4] * 1000 / 9
    assert moment_of(read(queued(at_random(rate, 600, seed), [10] * 600)).survey) is None


def test_a_rate_that_rises_is_told_with_what_requests_wait_for() -> None:
    before, after = at_random(30.0, 400, 1), at_random(100.0, 1000, 2)
    found = verdict(queued([*before, *(before[-1] + at for at in after)], [10] * 1400))

    assert found.findings[0].cause == "device_queue"
    assert found.change is not None
    assert found.change.differences[0].endswith("requests/s")


def released(spans: list[Span], number: int, **settings: Any) -> list[Span]:
    """Traces whose model replica has these settings from this request on."""
    return [
        replace(
            one, instance="model-new", resource={**one.resource, **{f"slowlens.{k}": v for k, v in settings.items()}}
        )
        if one.service == "slowlens.model" and int(one.trace_id, 16) % 10**6 >= number
        else replace(one, resource={**one.resource, **{f"slowlens.{k}": "old" for k in settings}})
        for one in spans
    ]


def test_a_slower_release_is_told_by_what_it_changed() -> None:
    spans = released(traffic(since(200, contention=8.0, replica="model-2")), 200, **{"model.source": "new"})
    found = verdict(spans)

    assert found.change is not None
    assert found.change.differences == ("other model replicas", "model.source old -> new (model)")
    assert [finding.cause for finding in found.findings] == ["device_contention"]
    assert "model.source old -> new" in str(found.findings[0].fix.pieces[0])


def test_compared_with_another_period_only_what_takes_longer_is_named() -> None:
    then = read(traffic(count=300))

    assert judge(read(traffic(count=300, seed=5)), then).findings == []
    assert judge(read(traffic(since(0, upload=0.5), 300)), then).findings == [], "it is faster"
    # What was always slow is no difference.
    slow = since(0, there=9.0, back=9.0)
    assert judge(read(traffic(slow, 300, 5)), read(traffic(slow, 300))).findings == []

    found = judge(read(traffic(since(0, contention=5.0), 300, 5)), then)
    assert [finding.cause for finding in found.findings] == ["device_contention"]
    assert found.findings[0].requests == 300

    rare = judge(read(traffic(lambda _, c: {"tokens": 200} if c.random() < 0.1 else {}, 300, 5)), then)
    assert [finding.cause for finding in rare.findings] == ["long_input"]
    assert rare.findings[0].requests < 60

    failing = judge(read(traffic(lambda _, c: {"error": "model_failed"} if c.random() < 0.1 else {}, 300)), then)
    assert [finding.cause for finding in failing.findings] == ["errors_retries"]
    assert judge(read(traffic(lambda n, _: {"error": "model_failed"} if n == 9 else {}, 300)), then).findings == []


def test_one_very_slow_request_is_no_difference() -> None:
    found = judge(read(traffic(lambda n, _: {"busy": 5000.0} if n == 7 else {}, 300)), read(traffic(count=300)))
    assert found.findings == []


def store(path: Path, spans: list[Span]) -> str:
    path.write_text(otlp(spans))
    return str(path)


def test_the_command_compares_with_a_source_and_with_a_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then = store(tmp_path / "then.jsonl", traffic(count=300))
    now = store(tmp_path / "now.jsonl", traffic(since(0, contention=5.0), 300))

    assert main(["why", "--source", now, "--against", then, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][0]["cause"] == "device_contention"
    assert told["against"]["requests"] == 300
    assert set(told["against"]) >= {"from", "to", "requests", "latency_ms"}
    assert told["against"]["latency_ms"]["p50"] < told["latency_ms"]["p50"]

    assert main(["why", "--source", now, "--against", then]) == 0
    assert "compared with 300 requests" in capsys.readouterr().out
    assert main(["why", "--source", now, "--against", then, "--format", "html"]) == 0
    assert "compared with 300 requests" in capsys.readouterr().out

    # 01:46:40Z is when the first request came in.
    both = store(tmp_path / "both.jsonl", traffic(since(200, contention=9.0)))
    window = "2001-09-09T01:46:40Z..2001-09-09T01:47:00Z"
    assert main(["why", "--source", both, "--against", window, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["against"]["requests"], told["findings"][0]["cause"]) == (200, "device_contention")


def test_the_moment_is_told_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = store(tmp_path / "one.jsonl", traffic(since(200, contention=9.0)))

    assert main(["why", "--source", source, "--format", "json"]) == 0
    change = json.loads(capsys.readouterr().out)["change"]
    assert change["p50_ms"]["after"] > change["p50_ms"]["before"]
    assert change["at"].startswith("2001-09-09T01:4")
    for form in ("text", "html"):
        assert main(["why", "--source", source, "--format", form]) == 0
        assert "requests take longer: p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "since_s", "rule"),
    [
        ("1d", None, "say with --since how long"),
        ("10m", 900, "at least 900s"),
        ("2026-11-25..2026-11-24", None, "ends before it begins"),
        ("2026-13-25..2026-11-24", None, "must be a time such as"),
        ("99999d", 60, "longer than"),
    ],
)
def test_an_invalid_period_says_the_rule(given: str, since_s: int | None, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        against(given, since_s, S)


def test_a_period_is_a_length_ago_or_from_until_or_a_source(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hour = 3600 * 10**9
    assert against("1d", 3600, S).until_ns == S - 24 * hour
    assert against("1d", 3600, S).since_ns == S - 25 * hour
    assert against("1970-01-01..1970-01-01T01:00+00:00", None, S).until_ns == hour
    assert against("traces/old", None, S).source == "traces/old"
    assert against("../old", None, S).source == "../old"
    assert against("http://jaeger:16686", None, S).source == "http://jaeger:16686"

    source = store(tmp_path / "one.jsonl", traffic(count=30))
    with pytest.raises(SystemExit) as ended:
        main(["why", "--source", source, "--against", "1d"])
    assert ended.value.code == 2
    assert "argument --against: '1d'" in capsys.readouterr().err
    assert main(["why", "--source", source, "--against", "1970-01-01..1970-01-02"]) == 1
    assert "no request in the period to compare with" in capsys.readouterr().err

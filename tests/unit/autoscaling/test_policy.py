"""The policy: when it adds and removes replicas, and how it handles missing information."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingPolicy

from deployments.autoscaling import QueueWaitPolicy
from deployments.autoscaling.announce import Announce, Announcement
from deployments.autoscaling.decide import Decision, Goal, Memory, Observation, decide
from deployments.autoscaling.report import LoadReport
from deployments.autoscaling.settings import POLICY, PolicySettings
from deployments.errors import ConfigError
from deployments.stages.replica import check_policy

GOAL = Goal(queue_wait_s=0.5, max_replicas=100)


def waiting(seconds: float, **more: float) -> LoadReport:
    """A replica with this many seconds of work waiting."""
    return LoadReport(queue_depth=seconds * 10, queue_wait_ms=seconds * 1e3, throughput=10, **more)


class Deployment:
    """Follows the policy: an ordered replica runs ``start_s`` later."""

    def __init__(self, replicas: int = 1, start_s: float = 0.0, goal: Goal = GOAL) -> None:
        self.now, self.goal, self.start_s = 0.0, goal, start_s
        self.running = self.target = replicas
        self.memory = Memory()
        self._coming: list[float] = []

    def look(self, load: LoadReport | None, seconds: float = 0.5) -> Decision:
        """Let every running replica report this load for ``seconds``."""
        for _ in range(round(seconds / 0.5)):
            while self._coming and self._coming[0] <= self.now:
                self._coming.pop(0)
                self.running += 1
            loads = (load,) * self.running if load is not None else ()
            made = decide(Observation(self.now, self.running, self.target, loads), self.memory, self.goal)
            if made.to_replicas > self.target:
                self._coming += [self.now + self.start_s] * (made.to_replicas - self.target)
            elif made.to_replicas < self.target:
                self.running = made.to_replicas
                self._coming = []
            self.target, self.memory = made.to_replicas, made.memory
            self.now += 0.5
        return made


def test_enough_replicas_run_the_queue_within_the_target() -> None:
    made = Deployment().look(waiting(3.0, demand=0.9))

    assert (made.to_replicas, made.reason) == (6, "queue")


@given(st.integers(1, 50), st.floats(0.51, 60))
def test_the_fewest_replicas_that_run_the_queue_within_the_target_are_chosen(running: int, seconds: float) -> None:
    made = decide(
        Observation(0, running, running, (waiting(seconds),) * running), Memory(), Goal(0.5, max_replicas=10**6)
    )

    assert running * seconds / made.to_replicas <= 0.5 * (1 + 1e-6)
    assert running * seconds / (made.to_replicas - 1) > 0.5 * (1 - 1e-6)


def test_a_wait_within_the_target_adds_no_replica() -> None:
    assert Deployment().look(waiting(0.5, demand=0.7)).to_replicas == 1


def test_demand_is_at_most_the_target_share_of_capacity() -> None:
    made = Deployment(4).look(LoadReport(demand=1.0))

    assert (made.to_replicas, made.reason) == (5, "demand")


def test_a_burst_of_demand_counts_only_with_a_queue() -> None:
    assert Deployment().look(LoadReport(demand=0.5, demand_now=5.0)).to_replicas == 1
    assert Deployment(start_s=5).look(waiting(0.6, demand=0.5, demand_now=5.0, start_ms=5000)).to_replicas >= 7


def test_a_queue_that_drains_before_a_replica_can_start_adds_none() -> None:
    assert Deployment(2).look(waiting(4.0, demand=0.1, start_ms=10_000)).to_replicas == 2


def test_a_growing_queue_is_sized_for_when_the_replicas_start() -> None:
    # One replica gets the work of five; after 10 s, 41 s of it wait. Running that in another 10 s takes four more.
    made = Deployment().look(waiting(1.0, demand=5.0, start_ms=10_000))

    assert made.to_replicas == 10
    assert made.reason == "queue"


def test_starting_replicas_are_not_ordered_again() -> None:
    deployment = Deployment(start_s=10)
    first = deployment.look(waiting(1.0, demand=5.0, start_ms=10_000))
    # The queue grows by 4 s of work every second.
    later = [deployment.look(waiting(1.0 + 2 * i, demand=5.0, start_ms=10_000)) for i in range(1, 20)]

    assert {made.to_replicas for made in later} == {first.to_replicas}


def test_the_start_time_is_learned_from_started_replicas() -> None:
    deployment = Deployment(start_s=8)
    deployment.look(waiting(3.0, demand=1.0))
    made = deployment.look(LoadReport(demand=0.1), 10)

    assert deployment.running > 1
    assert made.start_ms / 1e3 == pytest.approx(8, abs=0.5)


def test_a_rise_in_arrivals_is_extrapolated() -> None:
    deployment = Deployment(10, start_s=30)
    for second in range(120):
        made = deployment.look(LoadReport(demand=(5 + second * 0.1) / deployment.running, start_ms=30_000), 1)

    # Work for 17 replicas arrives, and for 3 more in 30 s.
    assert made.demand == pytest.approx(17, abs=0.2)
    assert made.needed_replicas == pytest.approx(20 / 0.8, abs=1)


def test_replicas_are_kept_through_a_pause_and_removed_after_it() -> None:
    deployment = Deployment(goal=Goal(0.5, quiet_s=60, max_replicas=100))
    deployment.look(waiting(2.0))
    for _ in range(5):
        assert deployment.look(LoadReport(demand=0.01), 50).to_replicas == 4
        deployment.look(LoadReport(demand=0.75))
    assert deployment.look(LoadReport(demand=0.01), 59).to_replicas == 4
    made = deployment.look(LoadReport(demand=0.01), 3)

    assert made.to_replicas == 1


def test_the_largest_need_of_the_quiet_period_is_kept() -> None:
    deployment = Deployment(10)
    deployment.look(LoadReport(demand=0.1 / 10), 30)
    deployment.look(LoadReport(demand=4.0 / 10), 1)
    made = deployment.look(LoadReport(demand=0.1 / 10), 40)

    assert made.to_replicas == 5


def test_replicas_that_are_slow_to_start_are_kept_longer() -> None:
    deployment = Deployment(4)

    assert deployment.look(LoadReport(demand=0.01, start_ms=60_000), 299).to_replicas == 4
    assert deployment.look(LoadReport(demand=0.01, start_ms=60_000), 3).to_replicas == 1


def test_an_order_for_a_replica_that_cannot_be_placed_expires() -> None:
    deployment = Deployment(start_s=1e9)
    deployment.look(waiting(0.9), 600)
    assert deployment.target > 1

    assert deployment.look(LoadReport(), 62).to_replicas == 1


def test_noise_does_not_cause_flapping() -> None:
    deployment = Deployment(10, start_s=2)
    targets = []
    for demand in itertools.islice(itertools.cycle([0.70, 0.79, 0.74, 0.81, 0.72]), 400):
        deployment.look(LoadReport(demand=demand * 10 / deployment.running, start_ms=2000))
        targets.append(deployment.target)

    assert sum(a != b for a, b in itertools.pairwise(targets)) <= 1


def test_without_reports_nothing_changes() -> None:
    deployment = Deployment(3)

    assert deployment.look(None, 600).to_replicas == 3


def test_replicas_that_stop_reporting_are_assumed_to_be_like_the_others() -> None:
    made = decide(Observation(0, 4, 4, (waiting(1.0, demand=0.5),), stale=3), Memory(), GOAL)

    assert made.demand == pytest.approx(2.0)
    assert made.to_replicas == 8
    assert made.reports == 1


def test_replicas_that_never_reported_count_as_idle() -> None:
    """For example 200, of which one got requests since the controller restarted, or new ones beside a busy one."""
    made = decide(Observation(0, 200, 200, (waiting(1.0, demand=0.9),)), Memory(), GOAL)

    assert made.demand == pytest.approx(0.9)
    assert made.to_replicas == 100


@pytest.mark.parametrize("field", [field.name for field in fields(LoadReport)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_impossible_report_counts_as_missing(field: str, value: float) -> None:
    busy = waiting(1.0, demand=0.5)
    made = decide(Observation(0, 4, 4, (busy, busy, busy, replace(busy, **{field: value}))), Memory(), GOAL)

    assert made.demand == pytest.approx(2.0)
    assert (made.reports, made.to_replicas) == (3, 8)


def test_an_enormous_need_is_clamped() -> None:
    made = decide(Observation(0, 1, 1, (LoadReport(queue_wait_ms=1e300, demand=1e300, throughput=1),)), Memory(), GOAL)

    assert (made.to_replicas, made.needed_replicas) == (100, 10**6)


def test_no_replica_is_removed_while_inputs_wait_at_an_unknown_rate() -> None:
    deployment = Deployment(4, goal=Goal(0.5, min_replicas=0))

    assert deployment.look(LoadReport(queue_depth=100), 600).to_replicas == 4


def test_a_replica_that_waited_for_resources_does_not_change_the_start_time() -> None:
    deployment = Deployment(start_s=5)
    deployment.look(waiting(10, demand=0.5), 12)
    deployment.start_s = 400
    deployment.look(waiting(20, demand=0.5), 0.5)
    late = deployment.look(waiting(0, demand=0.5), 420)

    assert late.start_ms / 1e3 == pytest.approx(5, abs=0.5)


def test_calls_queued_at_the_callers_count() -> None:
    """Replicas with ``max_ongoing_requests`` in progress do not see any more calls."""
    made = decide(Observation(0, 1, 1, (LoadReport(throughput=10.0, demand=0.5),), queued_calls=20), Memory(), GOAL)

    assert made.to_replicas == 4


def test_a_replica_that_has_run_nothing_has_no_rate() -> None:
    made = decide(
        Observation(0, 4, 4, (LoadReport(throughput=10.0, demand=0.5), *[LoadReport()] * 3), queued_calls=20),
        Memory(),
        GOAL,
    )

    assert made.throughput == 10


def test_no_replica_is_needed_without_arrivals() -> None:
    deployment = Deployment(1, goal=Goal(0.5, min_replicas=0, quiet_s=60))

    assert deployment.look(LoadReport(demand=1e-5), 59).to_replicas == 1
    assert deployment.look(LoadReport(demand=1e-5), 3).to_replicas == 0


def test_a_little_demand_keeps_one_replica() -> None:
    deployment = Deployment(1, goal=Goal(0.5, min_replicas=0))

    assert deployment.look(LoadReport(demand=0.01), 600).to_replicas == 1


def test_from_zero_serve_starts_the_first_replica_and_the_policy_the_rest() -> None:
    deployment = Deployment(0, goal=Goal(0.5, min_replicas=0))

    assert deployment.look(None).to_replicas == 0
    deployment.running = deployment.target = 1
    assert deployment.look(waiting(2.0)).to_replicas == 4


def test_the_bounds_are_respected_and_reported() -> None:
    made = Deployment(goal=Goal(0.5, max_replicas=3)).look(waiting(10.0))

    assert (made.to_replicas, made.needed_replicas, made.reason) == (3, 20, "at_max")
    assert decide(Observation(0, 1, 1, (LoadReport(),)), Memory(), Goal(0.5, min_replicas=2)).to_replicas == 2


# --- the adapter -----------------------------------------------------------------------------------------------------


def context(replicas: dict[str, tuple[float, LoadReport]], *, target: int = 1, most: int = 10, **config: float) -> Any:
    """The context that Serve passes: each replica's report, timestamped by its own clock."""
    raw: dict[str, dict[str, list[Any]]] = {}
    for replica, (taken_s, load) in replicas.items():
        for name, value in load.stats().items():
            raw.setdefault(name, {})[replica] = [SimpleNamespace(timestamp=taken_s, value=value)]
    return SimpleNamespace(
        app_name="slowlens",
        deployment_name="Model",
        current_num_replicas=max(1, len(replicas)),
        target_num_replicas=target,
        raw_metrics=raw,
        total_queued_requests=0.0,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
        config=SimpleNamespace(**config),
    )


class Policy(QueueWaitPolicy):
    """The policy on a clock that the test sets; records its announcements."""

    def __init__(self, **policy_kwargs: Any) -> None:
        super().__init__(**policy_kwargs)
        self.s = 1000.0
        self.announced: list[tuple[Announcement, bool]] = []
        self.monotonic_s = lambda: self.s
        self.unix_ns = lambda: int((self.s + 1e9) * 1e9)

    def start_announcing(self, *_: object) -> Announce:
        return lambda announcement, is_news: self.announced.append((announcement, is_news))

    @property
    def news(self) -> list[Announcement]:
        return [announcement for announcement, is_news in self.announced if is_news]


def test_a_decision_is_announced_once_with_its_inputs() -> None:
    policy = Policy(target_queue_wait_ms=500)
    burst = {"a": (5.0, waiting(3.0, oldest_age_ms=700, demand=0.9))}
    for target in (1, 1, 6, 6):
        policy.s += 0.5
        assert policy(context(burst, target=target)) == (6, {})

    (announcement,) = policy.news
    assert (announcement.application, announcement.deployment) == ("slowlens", "Model")
    assert (announcement.seen_unix_ns, announcement.decided_unix_ns) == (5 * 10**9, int((1000.5 + 1e9) * 1e9))
    assert announcement.stated() == {
        "reason": "queue",
        "from_replicas": 1,
        "to_replicas": 6,
        "needed_replicas": 6,
        "max_replicas": 10,
        "running_replicas": 1,
        "reports": 1,
        "demand": 0.9,
        "queue_depth": 30,
        "queue_wait_ms": 3000.0,
        "target_queue_wait_ms": 500.0,
        "oldest_age_ms": 700,
        "throughput": 10.0,
        "start_ms": 0.0,
    }
    assert str(announcement) == (
        "Model: 1 -> 6 replicas (queue, 6 needed), 1 running, 1 of them reported; 30 inputs waiting, 3000 ms of work "
        "(target 500 ms), the oldest for 700 ms; demand 0.90 replicas at 10.0 inputs per second each; a replica starts "
        "in 0.0 s"
    )


def test_a_limit_that_is_too_low_is_announced_once_a_minute() -> None:
    policy = Policy(target_queue_wait_ms=500)
    for number in range(150):
        policy.s += 1
        policy(context({name: (float(number), waiting(3.0)) for name in "ab"}, target=2, most=2))

    assert [one.decision.reason for one in policy.news] == ["at_max"] * 3
    assert "max_replicas is 2" in str(policy.news[0])


def test_stale_reports_count_as_missing_regardless_of_clock_skew() -> None:
    policy = Policy(target_queue_wait_ms=500, stale_s=10)
    # Two replicas whose clocks are a day apart; one of them stops reporting.
    for number in range(60):
        policy.s += 0.5
        loads = {"a": (float(number), LoadReport()), "b": (86_400.0, waiting(9.0))}
        policy(context(loads, target=10, most=20))

    assert (policy.news[0].decision.reports, policy.news[0].decision.to_replicas) == (2, 18)
    assert policy.announced[-1][0].decision.needed_replicas == 0


def test_replicas_started_by_serve_itself_are_kept() -> None:
    """From zero, Serve starts the first replica itself."""
    policy = Policy(target_queue_wait_ms=500)
    nobody = context({}, target=0)
    nobody.capacity_adjusted_min_replicas = 0

    assert policy(nobody) == (0, {})
    nobody.target_num_replicas = 1
    assert policy(nobody) == (1, {})


def test_a_failed_decision_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(target_queue_wait_ms=500)
    broken = context({"a": (5.0, waiting(3.0))}, target=7)
    broken.capacity_adjusted_max_replicas = None
    for _ in range(3):
        assert policy(broken) == (7, {})
        policy.s += 1

    assert caplog.text.count("Model: not scaled") == 1


def test_the_decision_does_not_change_between_two_reports() -> None:
    policy = Policy(target_queue_wait_ms=500)
    assert policy(context({"a": (1.0, waiting(3.0))}))[0] == 6
    policy.s += 0.1
    assert policy(context({}, target=6))[0] == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "policy_kwargs.target_queue_wait_ms: must be given"),
        ({"target_queue_wait_ms": 0}, "policy_kwargs.target_queue_wait_ms: must be a number above 0; got 0"),
        ({"target_queue_wait_ms": "1s"}, "policy_kwargs.target_queue_wait_ms: must be a number above 0; got '1s'"),
        ({"target_queue_wait_ms": True}, "must be a number above 0; got True"),
        ({"target_queue_wait_ms": float("nan")}, "must be a number above 0; got nan"),
        ({"target_queue_wait_ms": 5e-324}, "must be a number above 0; got 5e-324"),
        ({"target_queue_wait_ms": 1, "quiet_s": 10**400}, "policy_kwargs.quiet_s: must be a number 0 or more"),
        ({"target_queue_wait_ms": 1, "target_utilization": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"target_queue_wait_ms": 1, "quiet_s": -1}, "policy_kwargs.quiet_s: must be a number 0 or more; got -1"),
        ({"target_queue_wait_ms": 1, "telemetry_directory": 3}, "telemetry_directory: must be a path; got 3"),
        ({"target_queue_wait_ms": 1, "quiet": 3}, "policy_kwargs.quiet: unknown key; known here: target_queue_wait_ms"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="policy_kwargs") as refused:
        PolicySettings.parse(settings)

    assert message in str(refused.value)


def test_invalid_settings_change_nothing_and_do_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    """An exception would stop Serve's control loop for all applications."""
    policy = Policy(target_queue_wait_ms=-1)

    assert policy(context({"a": (1.0, waiting(9.0))}, target=3)) == (3, {})
    assert "not scaled: autoscaling_config.policy.policy_kwargs.target_queue_wait_ms" in caplog.text


def test_the_policy_is_pickled_by_value() -> None:
    """Serve's controller may have none of our code except what is sent to it."""
    policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"target_queue_wait_ms": 500})
    script = (
        "import sys, cloudpickle; sys.modules['deployments'] = None; "
        "policy = cloudpickle.loads(sys.stdin.buffer.read())(target_queue_wait_ms=500); "
        "print(policy.settings.target_queue_wait_ms)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], input=policy.get_serialized_policy_def(), capture_output=True, check=False
    )

    assert (ran.stdout, ran.stderr) == (b"500\n", b"")


SERVES_DEFAULT = AutoscalingPolicy().policy_function


@pytest.mark.parametrize(
    ("function", "has_channel", "problem"),
    [
        (POLICY, True, r"^deployments\.Model\.autoscaling_config\.policy\.policy_kwargs\.target"),
        (POLICY, False, r"^deployments\.Model\.autoscaling_config\.policy\.policy_kwargs\.target"),
        (SERVES_DEFAULT, True, r"^deployments\.Model\.autoscaling_config\.policy: Serve's default policy counts calls"),
        (SERVES_DEFAULT, False, None),
        ("somebody:Else", True, None),
    ],
)
def test_a_replica_whose_policy_cannot_work_does_not_start(
    function: str, has_channel: bool, problem: str | None
) -> None:
    policy = SimpleNamespace(policy_function=function, policy_kwargs={"target_queue_wait_ms": -5})
    config = SimpleNamespace(autoscaling_config=SimpleNamespace(policy=policy))
    context: Any = SimpleNamespace(deployment="Model", _deployment_config=config)

    if problem is None:
        check_policy(context, has_channel=has_channel)
    else:
        with pytest.raises(ConfigError, match=problem):
            check_policy(context, has_channel=has_channel)

"""What a device did while requests waited for it."""

from __future__ import annotations

from deployments.explain.requests.device import Device


def device(*runs: tuple[int, int, int, int, int]) -> Device:
    made = Device()
    for run in runs:
        made.add(*run)
    return made


RUNS = ((100, 50, 10, 20, 1), (150, 30, 5, 5, 2), (300, 100, 7, 70, 3))


def test_the_runs_of_an_interval_do_not_depend_on_the_order_added() -> None:
    for runs in (RUNS, RUNS[::-1]):
        made = device(*runs)
        assert list(made.during((120, 310))) == [(30, 50, 10, 20, 1), (30, 30, 5, 5, 2), (10, 100, 7, 70, 3)]
        assert list(made.during((180, 300))) == []
        assert list(made.during((0, 50))) == []
        assert list(made.during((330, 340))) == [(10, 100, 7, 70, 3)]
        assert [run.within_ns for run in made.during((0, 1000))] == [50, 30, 100]
    assert list(device().during((0, 1000))) == []


def test_a_run_added_later_is_included() -> None:
    made = device(*RUNS[:2])
    assert len(list(made.during((0, 1000)))) == 2
    made.add(*RUNS[2])
    assert len(list(made.during((0, 1000)))) == 3


def test_busy_time_is_on_the_ingress_clock() -> None:
    made = device(*((start + 5000, took, 1, 1, 1) for start, took, *_ in RUNS))
    assert sum(made.busy_ns((100, 400), 3, 100)) == 0
    made.ahead_ns = 5000
    assert made.busy_ns((100, 400), 3, 100) == [80, 0, 100]
    # Time outside the window is not counted.
    assert made.busy_ns((120, 350), 2, 115) == [60, 50]

"""Compare the autoscaling policy with Serve's own on patterns of half an hour, and a real run with its replay.

    python benchmarks/scaling            # every pattern and start time: a table and a plot, five minutes
    python benchmarks/scaling --only burst --starts 5
    python benchmarks/scaling --real     # one real run on this machine and the replay of its traces, five minutes

Requests are made from the patterns, and served by ``deployments.simulate``: the gate, planner, choice of a replica and
policies that run in production, in virtual time. A request is late if it waited longer than the target (500 ms) before
the device. Replicas are paid for from the time they are ordered; their cost is given as a multiple of what the arrivals
need at 80 % utilization. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import patterns
import policies
import real

from deployments.explain.requests.capture import Run
from deployments.explain.requests.parts import RunFit
from deployments.simulate.recording import Recorded, Recording
from deployments.simulate.replay import Policy, replay
from deployments.simulate.settings import settings_of

RESULTS = Path(__file__).parents[1] / "results"
BATCH, RUN_MS = 2, 200.0
RATE = BATCH / RUN_MS * 1e3
"""Requests per second that one replica runs in full batches."""
TARGET_MS = 500.0
PEAK = 8
"""Replicas that a pattern's peak needs at full utilization."""
STARTS_S = (5.0, 30.0)
"""A process only; a process and its weights."""
ONGOING = TARGET_MS / 1e3 * RATE
POLICIES: dict[str, tuple[Callable[[], Policy | None], float]] = {
    "slowlens": (lambda: None, 60.0),
    "slowlens, quiet_s: 300": (lambda: None, 300.0),
    "Serve's default": (lambda: policies.ServeDefault(ONGOING), 60.0),
    "Serve's, quick": (lambda: policies.serve_quick(ONGOING), 60.0),
}
_S = 10**9
_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Result:
    late_share: float
    """Of the requests, those that waited longer than the target or were refused."""
    late_s: float
    """Seconds in which most arriving requests did."""
    replica_s: float
    running: list[int]
    """Replicas, twice a second."""


def recording_of(pattern: str, start_s: float) -> Recording:
    """Requests that come at random times at the rate of a pattern."""
    levels, chance, at_s = patterns.read()[pattern], random.Random(0), 0.0
    run_ns = round(RUN_MS * 1e6)
    requests = []
    while (at_s := at_s + chance.expovariate(max(1e-3, levels[int(at_s)]) * PEAK * RATE)) < len(levels):
        requests.append(
            Recorded(round(at_s * _S), run_ns, "", 1, _TOKENS, 4 * _TOKENS, 60 * _S, "", 0, 0, 0, 0, 0, 0, 0, run_ns)
        )
    # As many replicas at first as the pattern begins with.
    first = max(1, round(levels[0] * PEAK / 0.8))
    runs = [
        Run((str(number), "b"), number, run_ns, 1, _TOKENS, _TOKENS, 0, "", False, None, (), f"replica {number}")
        for number in range(first)
    ]
    key = "deployments.Model.autoscaling_config"
    settings = {
        f"{key}.min_replicas": 1,
        f"{key}.max_replicas": 3 * PEAK,
        f"{key}.policy.policy_kwargs.target_queue_wait_ms": TARGET_MS,
        "batching.max_batch_size": BATCH,
    }
    return Recording(requests, runs, RunFit(RUN_MS, 0.0), settings, first, start_s)


def run(pattern: str, start_s: float, policy: str) -> Result:
    recording = recording_of(pattern, start_s)
    make, quiet_s = POLICIES[policy]
    change = {"deployments.Model.autoscaling_config.policy.policy_kwargs.quiet_s": quiet_s}
    done = replay(recording, settings_of(recording.settings, recording.replicas, change), policy=make())
    late: dict[int, int] = defaultdict(int)
    came: dict[int, int] = defaultdict(int)
    for one in recording.requests:
        came[one.at_ns // _S] += 1
    punctual = dict(came)
    for one, outcome in done.answered:
        if outcome.replica_wait_ns + outcome.queue_ns <= TARGET_MS * 1e6:
            punctual[one.at_ns // _S] -= 1
    # What is left was late, or was refused.
    late.update(punctual)
    return Result(
        sum(late.values()) / len(recording.requests),
        float(sum(count > came[second] / 2 for second, count in late.items())),
        done.replica_seconds,
        done.running,
    )


def row(pattern: str, start_s: float, results: dict[str, Result]) -> str:
    needed_s = sum(patterns.read()[pattern]) * PEAK / 0.8
    cells = [
        f"{result.late_share:.1%}, {result.late_s:.0f} s, {result.replica_s / needed_s:.2f}"
        for result in results.values()
    ]
    return f"| {pattern} | {start_s:g} s | {' | '.join(cells)} |"


def table(results: dict[tuple[str, float, str], Result]) -> Iterator[str]:
    yield f"| pattern | start | {' | '.join(POLICIES)} |"
    yield f"| --- | --- | {' | '.join('---' for _ in POLICIES)} |"
    for pattern, start_s in dict.fromkeys((pattern, start_s) for pattern, start_s, _ in results):
        yield row(pattern, start_s, {policy: results[pattern, start_s, policy] for policy in POLICIES})


def plot(results: dict[tuple[str, float, str], Result], start_s: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Plot one point every five seconds; more would not be visible.
    shown = list(dict.fromkeys(pattern for pattern, size, _ in results if size == start_s))
    figure, rows = pyplot.subplots(len(shown), 1, figsize=(9, 2.2 * len(shown)), sharex=True, squeeze=False)
    for (axes,), pattern in zip(rows, shown, strict=True):
        needed = [value * PEAK / 0.8 for value in patterns.read()[pattern]]
        axes.fill_between(range(0, len(needed), 5), needed[::5], color="0.85", label="needed")
        for policy in POLICIES:
            running = results[pattern, start_s, policy].running[::10]
            axes.plot(range(0, 5 * len(running), 5), running, linewidth=1, label=policy)
        axes.set_ylabel(pattern.replace("_", " "))
    rows[0][0].legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.35))
    rows[-1][0].set_xlabel(f"seconds; running replicas, where one starts in {start_s:g} s")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=patterns.PATTERNS, metavar="PATTERN")
    parser.add_argument("--starts", type=float, nargs="*", default=STARTS_S, metavar="SECONDS")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="folder for the table and scaling.svg")
    options = parser.parse_args()
    if options.real:
        text, name = real.compare(), "scaling_real.md"
    else:
        cases = list(itertools.product(options.only or patterns.PATTERNS, options.starts, POLICIES))
        with ProcessPoolExecutor() as pool:
            results = dict(zip(cases, pool.map(run, *zip(*cases, strict=True)), strict=True))
        text, name = "\n".join(table(results)), "scaling.md"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / name).write_text(text + "\n")
        if name == "scaling.md":
            plot(results, options.starts[0], options.output / "scaling.svg")


if __name__ == "__main__":
    main()

"""Compare the autoscaling policy with Serve's own on simulated deployments, and the simulation with a real run.

    python benchmarks/scaling            # every pattern and size: a table and a plot, about ten minutes
    python benchmarks/scaling --only burst --peaks 8
    python benchmarks/scaling --real     # one real run on this machine and its simulation, five minutes

A request is late if it waited longer than the target (500 ms) before the device. Replicas are paid for from the time
they are ordered; their cost is given as a multiple of what the arrivals need at 80 % utilization. The plot needs
matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import patterns
import policies
import real
from simulation import Policy, Result, Setup, simulate

RESULTS = Path(__file__).parents[1] / "results"
POLICIES: dict[str, Callable[[], Policy]] = {
    "slowlens": policies.QueueWait,
    "slowlens, quiet_s: 300": lambda: policies.QueueWait(300),
    "Serve's default": policies.serve_default,
    "Serve's, quick": policies.serve_quick,
}
RATE = 50.0
TARGET_S = 0.5
PEAKS = (8, 200, 2000)
STARTS_S = {8: 5.0, 200: 30.0, 2000: 120.0}
"""Replica start time by peak: a process only; a process and its weights; a new node."""


def setup_of(peak: int) -> Setup:
    return Setup(RATE, RATE * peak, STARTS_S[peak], TARGET_S, min_replicas=1, max_replicas=3 * peak)


def run(pattern: str, peak: int, policy: str) -> Result:
    return simulate(patterns.read()[pattern], POLICIES[policy](), setup_of(peak))


def row(pattern: str, peak: int, results: dict[str, Result]) -> str:
    needed_s = sum(patterns.read()[pattern]) * peak / 0.8
    cells = [
        f"{result.late_share:.1%}, {result.late_s:.0f} s, {result.replica_s / needed_s:.2f}"
        for result in results.values()
    ]
    return f"| {pattern} | {peak} | {STARTS_S[peak]:g} s | {' | '.join(cells)} |"


def table(results: dict[tuple[str, int, str], Result]) -> Iterator[str]:
    yield f"| pattern | replicas at its peak | start | {' | '.join(POLICIES)} |"
    yield f"| --- | --- | --- | {' | '.join('---' for _ in POLICIES)} |"
    for pattern, peak in dict.fromkeys((pattern, peak) for pattern, peak, _ in results):
        yield row(pattern, peak, {policy: results[pattern, peak, policy] for policy in POLICIES})


def plot(results: dict[tuple[str, int, str], Result], peak: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Plot one point every five seconds; more would not be visible.
    shown = [pattern for pattern, size, _ in results if size == peak]
    shown = list(dict.fromkeys(shown))
    figure, rows = pyplot.subplots(len(shown), 1, figsize=(9, 2.2 * len(shown)), sharex=True, squeeze=False)
    for (axes,), pattern in zip(rows, shown, strict=True):
        needed = [value * peak / 0.8 for value in patterns.read()[pattern]]
        axes.fill_between(range(0, len(needed), 5), needed[::5], color="0.85", label="needed")
        for policy in POLICIES:
            running = results[pattern, peak, policy].replicas
            axes.plot(range(0, len(running), 5), running[::5], linewidth=1, label=policy)
        axes.set_ylabel(pattern.replace("_", " "))
    rows[0][0].legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.35))
    rows[-1][0].set_xlabel(f"seconds; running replicas, where one starts in {STARTS_S[peak]:g} s")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=patterns.PATTERNS, metavar="PATTERN")
    parser.add_argument("--peaks", type=int, nargs="*", default=PEAKS, choices=PEAKS)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="folder for the table and scaling.svg")
    options = parser.parse_args()
    if options.real:
        text, name = real.compare(), "scaling_real.md"
    else:
        cases = list(itertools.product(options.only or patterns.PATTERNS, options.peaks, POLICIES))
        with ProcessPoolExecutor() as pool:
            results = dict(zip(cases, pool.map(run, *zip(*cases, strict=True)), strict=True))
        text, name = "\n".join(table(results)), "scaling.md"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / name).write_text(text + "\n")
        if name == "scaling.md":
            plot(results, options.peaks[0], options.output / "scaling.svg")


if __name__ == "__main__":
    main()

"""Arrival patterns: requests a second, second by second, as parts of the pattern's peak.

``python benchmarks/scaling/patterns.py`` made ``patterns.csv``, once: formulas with noise from a fixed seed, no traffic
of anybody. The simulation reads the file, so that a change of these formulas is a change of the file.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 1800
FILE = Path(__file__).with_name("patterns.csv")


def steady(_: float) -> float:
    """Always the same."""
    return 0.6


def burst(t: float) -> float:
    """Every five minutes, four times as much for 40 seconds."""
    return 1.0 if t % 300 >= 240 and t % 300 < 280 else 0.25


def ramp(t: float) -> float:
    """From little to all in twenty minutes, and then at once little again."""
    return 0.05 + 0.95 * t / 1200 if t < 1200 else 0.05


def diurnal(t: float) -> float:
    """A day in ten minutes, three times."""
    return 0.1 + 0.45 * (1 - math.cos(2 * math.pi * t / 600)) + 0.05 * math.sin(2 * math.pi * t / 97)


def flash_crowd(t: float) -> float:
    """Ten minutes of little; within five seconds twenty times as much, which fades by half every three minutes."""
    if t < 600:
        return 0.05
    return 0.05 + 0.95 * min(1.0, (t - 600) / 5) * 0.5 ** (max(0.0, t - 605) / 180)


PATTERNS: dict[str, Callable[[float], float]] = {
    "steady": steady,
    "burst": burst,
    "ramp": ramp,
    "diurnal": diurnal,
    "flash_crowd": flash_crowd,
}


def read() -> dict[str, list[float]]:
    with FILE.open() as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(row[name]) for row in rows] for name in PATTERNS}


def make() -> Iterator[list[str]]:
    noise = {name: random.Random(name) for name in PATTERNS}
    level = dict.fromkeys(PATTERNS, 0.0)
    for second in range(SECONDS):
        row = [str(second)]
        for name, pattern in PATTERNS.items():
            # Traffic wanders: what it was a moment ago it still is, for the most part.
            level[name] = 0.9 * level[name] + noise[name].gauss(0, 0.03)
            row.append(f"{max(0.0, pattern(second) * (1 + level[name])):.4f}")
        yield row


if __name__ == "__main__":
    with FILE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["second", *PATTERNS])
        writer.writerows(make())

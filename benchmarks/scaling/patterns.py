"""Arrival patterns: requests per second for each second, as fractions of the pattern's peak.

``python benchmarks/scaling/patterns.py`` generated ``patterns.csv`` once: formulas with noise from a fixed seed, not
recorded traffic. The replay reads the file, so changing these formulas requires regenerating it.
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
    """Constant."""
    return 0.6


def burst(t: float) -> float:
    """Four times the base rate for 40 seconds every five minutes."""
    return 1.0 if t % 300 >= 240 and t % 300 < 280 else 0.25


def ramp(t: float) -> float:
    """Rise from low to peak in twenty minutes, then drop back at once."""
    return 0.05 + 0.95 * t / 1200 if t < 1200 else 0.05


def diurnal(t: float) -> float:
    """Three daily cycles, each compressed into ten minutes."""
    return 0.1 + 0.45 * (1 - math.cos(2 * math.pi * t / 600)) + 0.05 * math.sin(2 * math.pi * t / 97)


def flash_crowd(t: float) -> float:
    """Ten minutes of low traffic, then twenty times as much within five seconds, which halves every three minutes."""
    if t < 600:
        return 0.05
    return 0.05 + 0.95 * min(1.0, (t - 600) / 5) * math.pow(0.5, max(0.0, t - 605) / 180)


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
            # Traffic drifts: each second's level mostly carries over from the previous one.
            level[name] = 0.9 * level[name] + noise[name].gauss(0, 0.03)
            row.append(f"{max(0.0, pattern(second) * (1 + level[name])):.4f}")
        yield row


if __name__ == "__main__":
    with FILE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["second", *PATTERNS])
        writer.writerows(make())

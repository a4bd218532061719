"""Simulate a deployment under a policy, in steps of a tenth of a second: the waits and the cost.

1. Each replica has its own queue, and requests stay in the queue they joined. A run takes
   ``run_ns + token_ns * tokens``, so a replica reaches its full rate with full batches; here it always has that rate.
2. Requests arrive in calls of four, each sent to the one of two random replicas with the shorter queue, as Serve's
   router does. A request waits for the rest of the current run, and for the runs of the requests that its replica had
   queued when it arrived.
3. An ordered replica runs ``start_s`` later. A removed replica takes no new requests and finishes those it has.
4. Policies see what replicas report twice a second, as Serve would present it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

STEP_S = 0.1
REPORT_S = 0.5
MEMORY_S = 5.0
GROUP = 4
"""Requests that share a call to the model."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Setup:
    """Parameters of a simulation."""

    rate: float
    """Requests per second that one replica runs."""
    peak: float
    """Requests per second where the pattern is 1."""
    start_s: float
    target_wait_s: float
    min_replicas: int
    max_replicas: int
    run_s: float = 0.05
    """Duration of a run, which holds ``rate * run_s`` requests."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of the replicas as a policy sees it."""

    at_s: float
    running: int
    target: int
    queued: Floats
    """Waiting requests, by replica."""
    arriving: Floats
    """Requests per second, by replica, as each measured them over the last few seconds."""
    arriving_now: Floats
    """The same over the last second."""


class Policy(Protocol):
    name: str

    def replicas(self, seen: Seen, setup: Setup) -> int: ...


@dataclass(slots=True)
class Result:
    requests: int = 0
    late: int = 0
    """Requests that waited longer than the target."""
    late_s: float = 0.0
    """Time during which most arriving requests waited longer than the target."""
    waits_s: list[float] = field(default_factory=list)
    """Mean wait of the requests that arrived, per step."""
    replica_s: float = 0.0
    """Replica-seconds of ordered replicas, running or not."""
    changes: int = 0
    replicas: list[int] = field(default_factory=list)
    """Running replicas, per second."""

    @property
    def late_share(self) -> float:
        return self.late / max(1, self.requests)


def simulate(pattern: Sequence[float], policy: Policy, setup: Setup, seed: int = 0) -> Result:
    draw = np.random.default_rng(seed)
    result = Result()
    first = min(setup.max_replicas, max(setup.min_replicas, math.ceil(pattern[0] * setup.peak / setup.rate / 0.8)))
    queued: Floats = np.zeros(first)
    arriving: Floats = np.full(first, pattern[0] * setup.peak / first if first else 0.0)
    starting: list[float] = []
    now_: Floats = arriving.copy()
    target = first
    for step in range(int(len(pattern) / STEP_S)):
        now = step * STEP_S
        came = sum(at <= now for at in starting)
        if came:
            starting = starting[came:]
            queued, arriving, now_ = (np.append(one, np.zeros(came)) for one in (queued, arriving, now_))
        count = int(draw.poisson(pattern[int(now)] * setup.peak * STEP_S))
        if len(queued):
            taken = _share_out(queued, count, draw)
            waits = _waits(queued + taken / 2, arriving, setup)
            late = float((taken * _late(waits, arriving, setup)).sum())
            mean = float((waits * taken).sum()) / count if count else 0.0
            queued = np.maximum(0.0, queued + taken - setup.rate * STEP_S)
            arriving = _follow(arriving, taken, MEMORY_S)
            now_ = _follow(now_, taken, 1.0)
        else:
            late, mean = float(count), setup.target_wait_s * 2 if count else 0.0
        result.requests += count
        result.late += round(late)
        result.late_s += STEP_S * (late > count / 2)
        result.waits_s.append(mean)
        result.replica_s += STEP_S * (len(queued) + len(starting))
        if step % round(1 / STEP_S) == 0:
            result.replicas.append(len(queued))
        if step % round(REPORT_S / STEP_S) == 0:
            seen = Seen(now, len(queued), target, queued, arriving, now_)
            wanted = max(setup.min_replicas, min(setup.max_replicas, policy.replicas(seen, setup)))
            result.changes += wanted != target
            if wanted > target:
                starting += [now + setup.start_s] * (wanted - target)
            elif wanted < target:
                # Remove replicas that are not running yet first, then those with the shortest queues.
                keep = max(0, len(starting) - (target - wanted))
                gone = target - wanted - (len(starting) - keep)
                starting = starting[:keep]
                order = np.argsort(queued)[gone:]
                queued, arriving, now_ = queued[order], arriving[order], now_[order]
            target = wanted
    return result


def _waits(before: Floats, arriving: Floats, setup: Setup) -> Floats:
    """Mean wait in seconds of requests that find ``before`` queued ahead: the rest of a run plus whole runs."""
    whole = np.floor(before / (setup.rate * setup.run_s)) * setup.run_s
    return whole + np.minimum(1.0, arriving / setup.rate) * setup.run_s / 2


def _late(waits: Floats, arriving: Floats, setup: Setup) -> Floats:
    """Share of arriving requests that wait longer than the target; the rest of the run is uniformly distributed."""
    busy = np.minimum(1.0, arriving / setup.rate)
    whole = waits - busy * setup.run_s / 2
    part = np.clip((whole + setup.run_s - setup.target_wait_s) / setup.run_s, 0.0, 1.0)
    late: Floats = busy * part + (1 - busy) * (whole > setup.target_wait_s)
    return late


def _follow(rate: Floats, taken: Floats, memory_s: float) -> Floats:
    forget = math.exp(-STEP_S / memory_s)
    return rate * forget + taken / STEP_S * (1 - forget)


def _share_out(queued: Floats, count: int, draw: np.random.Generator) -> Floats:
    """Requests per replica: each call goes to the one of two random replicas with the shorter queue."""
    taken: Floats = np.zeros(len(queued))
    calls = -(-count // GROUP)
    if calls:
        first, second = draw.integers(len(queued), size=(2, calls))
        chosen = np.where(queued[first] <= queued[second], first, second)
        np.add.at(taken, chosen, count / calls)
    return taken

"""In which order should an overloaded queue be served, and what should it refuse? Four answers, in simulated time.

    python benchmarks/queue_discipline.py

One device runs batches of up to 6 inputs of 40 ms each (and 2 ms a batch), which take a fifth more or less than that;
inputs arrive at random, each with a deadline of 2 s. Prints, for each discipline and load, the goodput (what was
answered in time, as a share of what the device can do), its latency, and how long it took to refuse the others.

- ``fifo``: in order of arrival; what has expired is dropped when its turn comes. At most 1,024 wait.
- ``newest first``: the same, from the other end.
- ``codel``: in order of arrival, with drops by CoDel (Nichols, Jacobson, ACM Queue 2012): as long as inputs have waited
  more than 100 ms for 500 ms, one is dropped, then more and more often.
- ``by expected end``: in order of arrival; refused on arrival if all that is ahead of it, with a quarter in reserve,
  would take longer than its deadline allows. This is what the gate does.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

INPUT_S, BATCH_S, SIZE, DEADLINE_S, SECONDS = 0.040, 0.002, 6, 2.0, 300.0
CAPACITY = SIZE / (BATCH_S + SIZE * INPUT_S)
ROOM, RESERVE = 1024, 1.25
TARGET_S, INTERVAL_S = 0.1, 0.5


@dataclass
class Queue:
    """Arrival times of what waits, and what became of the others."""

    waiting: deque[float] = field(default_factory=deque)
    refused_after_s: list[float] = field(default_factory=list)
    free_s: float = 0.0
    """When the device is free."""

    def refuse(self, arrived_s: float, now_s: float) -> None:
        self.refused_after_s.append(now_s - arrived_s)


class Fifo(Queue):
    def arrive(self, now_s: float) -> None:
        if len(self.waiting) < ROOM:
            self.waiting.append(now_s)
        else:
            self.refuse(now_s, now_s)

    def take(self) -> float:
        return self.waiting.popleft()

    def batch(self, now_s: float) -> list[float]:
        taken: list[float] = []
        while self.waiting and len(taken) < SIZE:
            arrived_s = self.take()
            if now_s + INPUT_S > arrived_s + DEADLINE_S:
                self.refuse(arrived_s, now_s)
            else:
                taken.append(arrived_s)
        return taken


class NewestFirst(Fifo):
    def take(self) -> float:
        return self.waiting.pop()


class CoDel(Fifo):
    above_since_s = math.inf
    drops = 0
    next_drop_s = math.inf

    def batch(self, now_s: float) -> list[float]:
        if not self.waiting or now_s - self.waiting[0] < TARGET_S:
            self.above_since_s, self.drops = math.inf, 0
        else:
            self.above_since_s = min(self.above_since_s, now_s)
            if now_s - self.above_since_s >= INTERVAL_S:
                if not self.drops:
                    self.next_drop_s = now_s
                while self.waiting and self.next_drop_s <= now_s:
                    self.refuse(self.waiting.popleft(), now_s)
                    self.drops += 1
                    self.next_drop_s += INTERVAL_S / math.sqrt(self.drops)
        return super().batch(now_s)


class ByExpectedEnd(Fifo):
    def arrive(self, now_s: float) -> None:
        count = len(self.waiting) + 1
        needs_s = max(0.0, self.free_s - now_s) + math.ceil(count / SIZE) * BATCH_S + count * INPUT_S
        if RESERVE * needs_s > DEADLINE_S:
            self.refuse(now_s, now_s)
        else:
            super().arrive(now_s)


def served(queue: Fifo, per_s: float) -> tuple[list[float], Queue]:
    """Latencies of what was answered in time."""
    chance = random.Random(7)
    arrives_s, good = chance.expovariate(per_s), []
    while arrives_s < SECONDS or queue.waiting:
        if arrives_s < SECONDS and (arrives_s <= queue.free_s or not queue.waiting):
            queue.arrive(arrives_s)
            now_s = max(arrives_s, queue.free_s)
            arrives_s += chance.expovariate(per_s)
            if arrives_s < SECONDS and arrives_s <= queue.free_s:
                continue
        now_s = max(now_s, queue.free_s)
        batch = queue.batch(now_s)
        if batch:
            ends_s = now_s + chance.uniform(0.8, 1.2) * (BATCH_S + INPUT_S * len(batch))
            queue.free_s = ends_s
            good += [ends_s - arrived_s for arrived_s in batch if ends_s - arrived_s <= DEADLINE_S]
    return good, queue


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def main() -> None:
    disciplines: dict[str, Callable[[], Fifo]] = {
        "fifo": Fifo,
        "newest first": NewestFirst,
        "codel": CoDel,
        "by expected end": ByExpectedEnd,
    }
    print("| discipline | load | goodput | latency p50 | p99 | refused after, p50 | p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, make in disciplines.items():
        for load in (0.9, 1.2, 3.0, 10.0):
            good, queue = served(make(), load * CAPACITY)
            times = [percentile(good, 0.5), percentile(good, 0.99)]
            times += [percentile(queue.refused_after_s, share) for share in (0.5, 0.99)]
            told = " | ".join(f"{one:.2f} s" for one in times)
            print(f"| {name} | {load:g} | {len(good) / SECONDS / CAPACITY:.2f} | {told} |")


if __name__ == "__main__":
    main()

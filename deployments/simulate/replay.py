"""Serves recorded requests again, in virtual time: the real gate, planner, choice of a replica and autoscaling policy.

1. A request reaches its model replica when it did, counted from its arrival, and has the same size and deadline. With
   a higher rate, arrivals are closer together.
2. A run takes what the runs of the recording took for so many tokens, times how much slower or faster than that the run
   was that was recorded at that time: noise, and periods in which everything was slow, are where they were.
3. Whatever a request does beside the model takes as long as it did. What it waits for a replica is simulated.
4. Replicas are ordered by the policy, if there is one, from what the simulated replicas report, and start as slowly as
   the recorded ones.
"""

from __future__ import annotations

import asyncio
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from deployments.autoscaling.announce import Announce
from deployments.autoscaling.meters import BatchQueueMeter
from deployments.autoscaling.policy import QueueWaitPolicy
from deployments.batching.cost import RunCost
from deployments.batching.entry import BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import limits_of
from deployments.errors import ApiError
from deployments.messages import Share
from deployments.simulate.recording import Recorded, Recording
from deployments.simulate.settings import Settings
from deployments.simulate.virtual_time import now_ns, run
from deployments.transport.connection import least_work

_REPORT_S = 0.5
_SETTLE_S = 5.0
"""How many replicas served in this time is how many there were at the start."""
_DEFAULT_START_S = 10.0
_WORKERS = 2
"""As in the batch runner: one batch runs, the next is ready."""


@dataclass(slots=True)
class Outcome:
    """Of one request that was answered, in nanoseconds."""

    latency_ns: int
    replica_wait_ns: int
    queue_ns: int
    forward_ns: int


@dataclass(slots=True)
class Replayed:
    answered: list[tuple[Recorded, Outcome]] = field(default_factory=list)
    refused: int = 0
    replica_seconds: float = 0.0
    replicas: int = 0
    """At most."""
    running: list[int] = field(default_factory=list)
    """Replicas that could serve, twice a second."""


Policy = Callable[[Any], tuple[float, Any]]
"""As Serve calls it: from an AutoscalingContext to a number of replicas and a state."""


def replay(recording: Recording, settings: Settings, rate: float = 1.0, policy: Policy | None = None) -> Replayed:
    """Serve the recorded requests with these settings, ``rate`` times as fast as they came.

    Replicas are scaled, if they are, by ``policy`` instead of our own.
    """
    # In a thread of its own: the caller's may have an event loop that runs.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(lambda: run(_Replay(recording, settings, rate, policy).run())).result()


class _Replica:
    """One model replica: the real gate in front of a device that takes its time."""

    def __init__(self, replay: _Replay, settings: Settings, started_s: float) -> None:
        self._replay, self._max_ongoing = replay, settings.max_ongoing_requests
        self.gate: AdmissionGate[None] = AdmissionGate(limits_of(settings.config.batching), now_ns)
        fit = replay.recording.fit
        self.gate.planner.cost = RunCost(max(1_000.0, fit.run_ms * 1e6), max(1.0, fit.token_ms * 1e6))
        clock = asyncio.get_running_loop().time
        self.meter = BatchQueueMeter(self.gate, started_s, clock, lambda: 0.0)
        self._device = asyncio.Lock()
        self.calls = self.own_work = 0
        self._workers = [asyncio.ensure_future(self._run_batches()) for _ in range(_WORKERS)]

    # What a caller chooses by, as of a connection.

    @property
    def has_room(self) -> bool:
        return self.calls < self._max_ongoing

    def hangs(self, now_s: float) -> bool:  # noqa: ARG002
        return False

    def work(self, now_s: float) -> float:  # noqa: ARG002
        return self.own_work

    async def serve(self, entries: list[BatchEntry[None]], tokens: int) -> list[Any]:
        work = tokens + 16 * len(entries)
        self.calls += 1
        self.own_work += work
        self.meter.arrive(tuple(entry.tokens for entry in entries))
        try:
            return await self.gate.submit(entries)
        finally:
            self.calls -= 1
            self.own_work -= work

    async def _run_batches(self) -> None:
        handover_s = self._replay.recording.handover_ns / 1e9
        while True:
            batch = await self.gate.next_batch()
            async with self._device:
                if present := batch.present:
                    if self.gate.depth or len(present) > 1:
                        await asyncio.sleep(handover_s)
                    self.gate.begin(batch)
                    padded = self.gate.planner.padded_tokens(present)
                    took_ns = self._replay.run_ns(padded)
                    await asyncio.sleep(took_ns / 1e9)
                    self.gate.planner.observe(padded, took_ns)
                for entry in batch.entries:
                    entry.deliver(None)
                self.gate.end(batch)

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)


class _Replay:
    def __init__(self, recording: Recording, settings: Settings, rate: float, policy: Policy | None) -> None:
        self.recording, self._settings, self._rate = recording, settings, rate
        self._policy = policy
        self._begin_ns = recording.requests[0].at_ns
        self._run_starts = [run.started_ns - self._begin_ns for run in recording.runs]
        self._factors = [run.took_ns / 1e6 / max(1e-6, recording.fit.ms(run.padded_tokens)) for run in recording.runs]
        self._lived_ns = recording.lived_ns
        self._replicas: list[_Replica] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._found = Replayed()
        self._target = 0
        self._starting: list[asyncio.Task[None]] = []
        self._left: list[_Replica] = []
        self._origin_s = 0.0
        self._chance = random.Random(0)

    def run_ns(self, padded_tokens: int) -> float:
        """What a run takes that begins now."""
        at_ns = (asyncio.get_running_loop().time() - self._origin_s) * 1e9 * self._rate
        after = bisect_left(self._run_starts, at_ns)
        near = min(
            range(max(0, after - 1), min(len(self._run_starts), after + 1)),
            key=lambda number: abs(self._run_starts[number] - at_ns),
        )
        return self.recording.fit.ms(padded_tokens) * 1e6 * self._factors[near]

    async def run(self) -> Replayed:
        loop = asyncio.get_running_loop()
        self._origin_s = loop.time()
        for _ in range(self._at_first()):
            self._replicas.append(_Replica(self, self._settings, self._origin_s))
        self._target = len(self._replicas)
        self._found.replicas = self._target
        scaling = asyncio.ensure_future(self._scale()) if self._settings.is_scaled else None
        counting = asyncio.ensure_future(self._count())
        requests = []
        for one in self._arrivals():
            at_s = self._origin_s + ((one.at_ns - self._begin_ns) / self._rate + one.before_ns) / 1e9
            if (delay_s := at_s - loop.time()) > 0:
                await asyncio.sleep(delay_s)
            requests.append(asyncio.ensure_future(self._request(one)))
            if len(requests) > 4096:
                requests = [task for task in requests if not task.done()]
        await asyncio.gather(*requests)
        background = [task for task in (scaling, counting, *self._starting) if task is not None]
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in (*self._replicas, *self._left)))
        return self._found

    def _arrivals(self) -> list[Recorded]:
        """Those that reach the model, in the order in which they do."""
        most_chars = self._settings.config.limits.max_input_chars
        taken = []
        for one in self.recording.requests:
            if one.chars > most_chars * one.inputs:
                self._found.refused += 1
            else:
                taken.append(one)
        return sorted(taken, key=lambda one: (one.at_ns - self._begin_ns) / self._rate + one.before_ns)

    def _at_first(self) -> int:
        if not self._settings.is_scaled:
            return self._settings.max_replicas
        until_ns = self._begin_ns + _SETTLE_S * 1e9
        seen = len({run.replica for run in self.recording.runs if run.started_ns < until_ns})
        return min(self._settings.max_replicas, max(self._settings.min_replicas, seen))

    # --- the path of a request ---

    async def _request(self, one: Recorded) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        left_ns = one.timeout_ns - one.before_ns
        try:
            async with asyncio.timeout(max(0.0, left_ns / 1e9)):
                replica = await self._choose()
                waited_s = loop.time() - began_s
                tokens = self._tokens(one)
                deadline_ns = round(began_s * 1e9) + left_ns
                share = Share(one.tenant)
                entries = [BatchEntry[None](None, each, deadline_ns, share) for each in tokens]
                outcomes = await replica.serve(entries, sum(tokens))
        except (ApiError, TimeoutError):
            self._found.refused += 1
            return
        finally:
            self._let_in()
        if any(isinstance(outcome, BaseException) for outcome in outcomes):
            self._found.refused += 1
            return
        took_ns = round((loop.time() - began_s) * 1e9) + self._lived_ns
        # A request of several inputs may be in several runs: what it waited is the rest.
        queue_ns = max(entry.wait_ns for entry in entries)
        waited_ns = round(waited_s * 1e9)
        outcome = Outcome(
            one.before_ns + took_ns + one.after_ns, waited_ns, queue_ns, max(0, took_ns - waited_ns - queue_ns)
        )
        self._found.answered.append((one, outcome))

    def _tokens(self, one: Recorded) -> Sequence[int]:
        """Of each input. Only their sum is recorded."""
        each, more = divmod(max(one.tokens, one.inputs), one.inputs)
        longest = self._settings.max_length or math.inf
        return [int(min(longest, each + (number < more))) for number in range(one.inputs)]

    async def _choose(self) -> _Replica:
        loop = asyncio.get_running_loop()
        while (chosen := least_work(self._replicas, loop.time(), self._chance)) is None:
            if not self._replicas and not self._starting:
                # Serve starts the first replica by itself.
                self._order(1)
            room = loop.create_future()
            self._waiting.append(room)
            try:
                await room
            finally:
                if room in self._waiting:
                    self._waiting.remove(room)
        return chosen

    def _let_in(self) -> None:
        while self._waiting and any(replica.has_room for replica in self._replicas):
            room = self._waiting.popleft()
            if not room.done():
                room.set_result(None)
                return

    # --- replicas ---

    async def _count(self) -> None:
        """Sum up what the replicas, running or starting, cost."""
        while True:
            began_s = asyncio.get_running_loop().time()
            self._found.running.append(len(self._replicas))
            try:
                await asyncio.sleep(_REPORT_S)
            finally:
                took_s = asyncio.get_running_loop().time() - began_s
                self._found.replica_seconds += took_s * (len(self._replicas) + len(self._starting))

    async def _scale(self) -> None:
        policy: Policy = self._policy or _Policy(**self._settings.policy)
        while True:
            await asyncio.sleep(_REPORT_S)
            proposed, _ = policy(self._seen())
            wanted = min(self._settings.max_replicas, max(self._settings.min_replicas, math.ceil(proposed)))
            if wanted > self._target:
                self._order(wanted - self._target)
            elif wanted < self._target:
                self._remove(self._target - wanted)
            self._found.replicas = max(self._found.replicas, self._target)

    def _seen(self) -> Any:
        """What Serve tells a policy."""
        now_s = asyncio.get_running_loop().time()
        reports = {id(replica): replica.meter.report().stats() for replica in self._replicas}
        series: dict[str, dict[int, list[Any]]] = {}
        for replica, stats in reports.items():
            for name, value in stats.items():
                series.setdefault(name, {})[replica] = [SimpleNamespace(timestamp=now_s, value=value)]
        return SimpleNamespace(
            app_name="slowlens",
            deployment_name="Model",
            target_num_replicas=self._target,
            current_num_replicas=len(self._replicas),
            capacity_adjusted_min_replicas=self._settings.min_replicas,
            capacity_adjusted_max_replicas=self._settings.max_replicas,
            total_queued_requests=len(self._waiting),
            total_num_requests=len(self._waiting) + sum(replica.calls for replica in self._replicas),
            current_time=now_s,
            raw_metrics=series,
            config=SimpleNamespace(),
        )

    def _order(self, count: int) -> None:
        self._target += count
        self._starting += [asyncio.ensure_future(self._start()) for _ in range(count)]

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await asyncio.sleep(self.recording.start_s or _DEFAULT_START_S)
        task = asyncio.current_task()
        assert task is not None
        self._starting.remove(task)
        self._replicas.append(_Replica(self, self._settings, began_s))
        self._let_in()

    def _remove(self, count: int) -> None:
        """Those that have not started yet first, then those with the least to do, which finish it."""
        for _ in range(min(count, self._target)):
            self._target -= 1
            if self._starting:
                self._starting.pop().cancel()
            elif self._replicas:
                gone = min(self._replicas, key=lambda replica: replica.own_work)
                self._replicas.remove(gone)
                self._left.append(gone)


class _Policy(QueueWaitPolicy):
    """Decides in virtual time, and tells nobody."""

    @staticmethod
    def monotonic_s() -> float:
        return asyncio.get_running_loop().time()

    @staticmethod
    def start_announcing(policy: object, telemetry_directory: str | None) -> Announce:  # noqa: ARG004
        return lambda *_: None

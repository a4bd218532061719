"""Runs steps in the device's thread, one after the other, as long as there are sequences.

The thread never waits for the event loop: what it is asked to do reaches it through a queue that it looks into before
each step, and what a step gave goes back as one message. The path of a step is ``_step``, top to bottom.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

from deployments.batching.generation.steps import Plan, Sequence, StepLimits, StepPlanner
from deployments.batching.watch import RunWatch
from deployments.config import GenerationConfig
from deployments.engine.protocol import Sampled, StepEngine, WarmUp
from deployments.messages import FinishReason, Sampling
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import ModelLoadRecord

_logger = logging.getLogger("slowlens.model")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    plan: Plan
    sampled: tuple[Sampled | None, ...]
    finished: tuple[tuple[Sequence, FinishReason], ...]
    started_ns: int
    ended_ns: int
    waiting: int
    kv_used_ratio: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that the model failed on, alone."""

    sequence: Sequence
    error: Exception


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is left to do for now."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """No further step will run in this process."""


Report = StepReport | Failed | Idle | Stopped
Command = Callable[[], None] | None


class StepRunner:
    """Owns the thread, the planner and the engine's cache.

    Args:
        engine: computes steps.
        telemetry: for the span of the load.
        config: limits of a step.
        deliver: called on the event loop with what happened, in its order.
    """

    def __init__(
        self, engine: StepEngine, telemetry: Telemetry, config: GenerationConfig, deliver: Callable[[Report], None]
    ) -> None:
        self._engine, self._telemetry, self._config, self._deliver = engine, telemetry, config, deliver
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="slowlens-device", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded: Future[WarmUp] = Future()
        self._load_record: ModelLoadRecord | None = None
        self._failure: str | None = None
        self._watch = RunWatch()
        self.planner: StepPlanner

    # --- from other threads ---

    def load(self) -> ModelLoadRecord:
        """Load the model and warm it up, in the thread that will run it. Blocks."""
        with self._telemetry.model_load() as record:
            record.device = self._engine.device
            self._load_record = record
            self._thread.start()
            self._loaded.result()
            memory = self._engine.memory()
            if memory is not None:
                record.memory_allocated_gb, record.memory_reserved_gb = memory.allocated_gb, memory.reserved_gb
        return record

    def start(self) -> None:
        """Deliver on the running loop from now on."""
        self._loop = self._loop or asyncio.get_running_loop()

    @property
    def broken(self) -> str | None:
        """Why no further step can run in this process; None while they can."""
        if self._engine.broken is not None:
            return f"the device can no longer be used: {self._engine.broken}"
        if self._failure is None and not self._thread.is_alive():
            return "the thread that runs steps has stopped"
        return self._failure or self._watch.broken

    @property
    def is_stuck(self) -> bool:
        """Whether a step takes far longer than it should."""
        return self._watch.is_stuck

    def submit(self, sequence: Sequence, sampling: Sampling) -> None:
        def add() -> None:
            self._engine.start(sequence.number, sampling)
            self.planner.add(sequence)

        self._commands.put(add)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence before the next step; does nothing if it has ended."""
        self._commands.put(lambda: self._remove(sequence))

    def close(self) -> None:
        """Stop after the step that runs."""
        self._commands.put(None)

    # --- in the device's thread ---

    def _work(self) -> None:
        try:
            assert self._load_record is not None
            warm_up = self._engine.load(functools.partial(self._telemetry.load_phase, self._load_record))
            config = self._config
            limits = StepLimits(config.max_sequences, config.max_batch_tokens, config.max_step_ms, config.kv_reserve)
            self.planner = StepPlanner(limits, self._engine.cache)
            if warm_up.runs:
                (prompt, prefill_ns), (_, decode_ns) = warm_up.runs
                self.planner.cost.fit(prompt, prefill_ns, decode_ns)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(warm_up)
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            self._failure = f"the thread that runs steps has failed ({type(error).__name__})"
            _logger.exception("the thread that runs steps has failed")
            self._tell(Stopped())

    def _obey(self) -> bool:
        """Do what was asked for; wait while there is nothing to do. Returns False when it is time to stop."""
        is_idle = False
        while True:
            if self._commands.empty() and not self.planner.running and not self.planner.waiting:
                if not is_idle:
                    is_idle = True
                    self._tell(Idle())
            elif self._commands.empty():
                return True
            command = self._commands.get()
            if command is None:
                return False
            command()

    def _step(self) -> None:
        plan = self.planner.plan()
        started_ns = time.monotonic_ns()
        try:
            with self._watch.run(self.planner.cost.estimate(plan.decode_tokens, plan.prefill_tokens)):
                sampled = tuple(self._engine.step(plan.members)) if plan.members else ()
        except Exception as error:
            self._note_failure(plan, error)
            return
        ended_ns = time.monotonic_ns()
        self.planner.done(plan)
        if plan.members:
            self.planner.cost.observe(plan.decode_tokens, plan.prefill_tokens, ended_ns - started_ns)
        finished = tuple(self._finished(plan, sampled))
        report = StepReport(
            plan, sampled, finished, started_ns, ended_ns, len(self.planner.waiting), self.planner.used_ratio
        )
        self._tell(report)
        for sequence, _ in finished:
            self._remove(sequence)

    def _finished(self, plan: Plan, sampled: tuple[Sampled | None, ...]) -> list[tuple[Sequence, FinishReason]]:
        """Append the new tokens, and return the sequences that end with them."""
        finished: list[tuple[Sequence, FinishReason]] = []
        for member, one in zip(plan.members, sampled, strict=True):
            if one is None:
                continue
            sequence = member.sequence
            sequence.generated.append(one.token)
            if one.token in self._engine.end_tokens:
                finished.append((sequence, "stop"))
            elif len(sequence.generated) >= sequence.max_tokens:
                finished.append((sequence, "length"))
        return finished

    def _note_failure(self, plan: Plan, error: Exception) -> None:
        """Find out whom the model fails on: everybody is computed again, alone. Who fails alone, has failed."""
        error = error.with_traceback(None)
        if self._engine.broken is not None:
            raise error
        if len(plan.members) > 1:
            _logger.warning("a step of %d sequences failed: %s", len(plan.members), type(error).__name__)
            self.planner.isolate([member.sequence for member in plan.members])
            return
        sequence = plan.members[0].sequence
        _logger.error("the model failed on one sequence", exc_info=error)
        self._remove(sequence)
        self._tell(Failed(sequence, error))

    def _remove(self, sequence: Sequence) -> None:
        self.planner.remove(sequence)
        self._engine.forget(sequence.number)

    def _tell(self, report: Report) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, report)

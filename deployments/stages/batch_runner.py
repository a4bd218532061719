"""Runs batches from the queue on the device, through ``@serve.batch``, and delivers the outputs to their callers.

The path of a batch is ``_work``, top to bottom: pull it from the gate, run it, deliver every input's output, end it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from ray import serve

from deployments.batching.entry import Batch, BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.watch import RunWatch
from deployments.engine.protocol import BatchEngine, OutOfMemory, Run
from deployments.errors import InternalError
from deployments.messages import Ids
from deployments.telemetry import metrics
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import BatchRecord, Fault, ModelLoadRecord, RunInput

_logger = logging.getLogger("slowlens.model")
_WORKERS = 2
"""One runs its batch; the other holds the batch that is ready to follow, collated and copied to the device."""
Entry = BatchEntry[RunInput]
RunEntries = Callable[[list[Entry]], Awaitable[list[None]]]
SubmitEntries = Callable[[Sequence[Entry]], Awaitable[Any]]
Batched = Callable[[RunEntries, int], SubmitEntries]


class RunFailed(Exception):
    """The model raised on this input alone; its exception is the cause."""


def serve_batched(run: RunEntries, max_batch_size: int) -> SubmitEntries:
    """Wrap ``run`` in ``@serve.batch``.

    All entries of a batch are submitted in one tick of the event loop and the timeout is 0, so the batch that Serve
    forms is the batch that the gate planned. Decorated here and not on a class because the queue of ``@serve.batch``
    belongs to one function and one event loop.
    """

    async def run_batch(entries: list[Entry]) -> list[None]:
        return await run(entries)

    # ``@serve.batch`` reads the signature on every call; setting it saves computing it each time.
    run_batch.__signature__ = inspect.signature(run_batch)  # type: ignore[attr-defined]
    decorate = serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=0, max_concurrent_batches=_WORKERS)
    batched: Any = decorate(run_batch)

    async def submit(entries: Sequence[Entry]) -> None:
        await asyncio.gather(*map(batched, entries))

    return submit


class BatchRunner:
    """Runs the batches that the gate releases.

    Args:
        engine: runs batches, in its own thread.
        gate: the queue that batches are pulled from.
        telemetry: for the spans of loads, batches and runs.
        max_batch_size: maximum inputs per batch.
        batched: wraps the function that runs entries so that it is called with a batch of them.
    """

    def __init__(
        self,
        engine: BatchEngine,
        gate: AdmissionGate[RunInput],
        telemetry: Telemetry,
        max_batch_size: int,
        batched: Batched = serve_batched,
    ) -> None:
        self._engine, self._gate, self._telemetry = engine, gate, telemetry
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slowlens-device")
        self._collate_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slowlens-collate")
        self._submit = batched(self._run_entries, max_batch_size)
        self._workers: list[asyncio.Task[None]] = []
        self._watch = RunWatch()

    @property
    def broken(self) -> str | None:
        """Why no further batch can run in this process; None while they can."""
        if self._engine.broken is not None:
            return f"the device can no longer be used: {self._engine.broken}"
        if any(worker.done() for worker in self._workers):
            return "a worker that runs batches has stopped"
        return self._watch.broken

    @property
    def is_stuck(self) -> bool:
        """Whether a run takes far longer than it should."""
        return self._watch.is_stuck

    def load(self) -> ModelLoadRecord:
        """Load the model and warm it up, in the thread that will run it. Blocks."""
        with self._telemetry.model_load() as record:
            record.device = self._engine.device
            phase = functools.partial(self._telemetry.load_phase, record)
            warm_up = self._device_thread.submit(self._engine.load, phase).result()
            memory = self._engine.memory()
            if memory is not None:
                record.memory_allocated_gb, record.memory_reserved_gb = memory.allocated_gb, memory.reserved_gb
        self._gate.planner.cost.fit(warm_up.runs)
        if warm_up.too_large is not None:
            self._note_out_of_memory(warm_up.too_large)
        return record

    def start(self) -> None:
        """Start pulling batches, on the running loop. Does nothing if already started."""
        if not self._workers:
            self._workers = [asyncio.ensure_future(self._work()) for _ in range(_WORKERS)]

    def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        for thread in (self._device_thread, self._collate_thread):
            thread.shutdown(wait=False)

    async def _work(self) -> None:
        """Process each batch from its release to its end."""
        while True:
            batch = await self._gate.next_batch()
            try:
                await self._submit(batch.entries)
            except Exception:
                # Not a failure of the model, which is isolated below, but an internal one.
                _logger.exception("a batch of %d failed", len(batch.entries))
            finally:
                for entry in batch.entries:
                    if not entry.result.done():
                        entry.fail(InternalError("the input was abandoned before it ran"))
                self._gate.end(batch)

    async def _run_entries(self, entries: list[Entry]) -> list[None]:
        """Called by ``@serve.batch`` with the entries of one batch."""
        batch, collated = entries[0].batch, None
        assert batch is not None
        if self._gate.is_busy:
            # This batch is ready to follow: its collation and its copies overlap the previous run.
            collated = self._collate_thread.submit(self._engine.collate, _ids(entries))
        await self._run_isolated(batch, entries, collated)
        return [None] * len(entries)

    async def _run_isolated(
        self, batch: Batch[RunInput], entries: Sequence[Entry], collated: Future[Any] | None = None
    ) -> None:
        """Run the entries together and deliver. If the run fails, run each half, until the failing input is alone."""
        loop, run = asyncio.get_running_loop(), _DeviceRun(entries, collated)
        watched = self._watch.run(self._gate.planner.run_ns(entries))
        begins = functools.partial(loop.call_soon_threadsafe, self._run_begins, batch, run)
        try:
            result = await loop.run_in_executor(self._device_thread, run.on_device, self._engine, begins, watched)
        except Exception as error:
            failure = self._note_failure(error, run)
        else:
            self._run_ends(run, result)
            return
        # Outside the handler, which would keep the failed run's tensors alive while its halves run.
        entries = run.entries
        if len(entries) == 1 or self._engine.broken is not None:
            for entry in entries:
                failed = RunFailed()
                failed.__cause__ = failure
                entry.fail(failed)
            return
        half = len(entries) // 2
        await self._run_isolated(batch, entries[:half])
        await self._run_isolated(batch, entries[half:])

    def _run_begins(self, batch: Batch[RunInput], run: _DeviceRun) -> None:
        """On the event loop, while the run is in progress. The first run of a batch ends the wait of its inputs."""
        if not batch.has_started:
            self._gate.begin(batch, run.started_ns)
            self._telemetry.batch_begins(batch)
        padded_tokens = self._gate.planner.padded_tokens(run.entries)
        run.record = self._telemetry.run_begins(batch, run.entries, padded_tokens, run.started_ns)

    def _run_ends(self, run: _DeviceRun, result: Run | None) -> None:
        """Record the run and deliver its outputs. ``result`` is None if all callers were gone before the run."""
        if result is None or run.record is None:
            return
        record = run.record
        record.device, record.inference_ms = self._engine.device, result.inference_ms
        record.output_shape, record.peak_memory_gb = result.output_shape, result.peak_memory_gb
        record.padded_tokens = result.padded_tokens
        self._gate.planner.observe(result.padded_tokens, run.ended_ns - run.started_ns)
        self._telemetry.run_ends(record, run.ended_ns)
        for entry, output in zip(run.entries, result.outputs, strict=True):
            entry.deliver(output)

    def _note_failure(self, error: Exception, run: _DeviceRun) -> Exception:
        if run.record is not None:
            self._telemetry.run_ends(run.record, time.monotonic_ns(), error)
        if isinstance(error, OutOfMemory):
            self._note_out_of_memory(self._gate.planner.padded_tokens(run.entries))
        if len(run.entries) == 1:
            payload = run.entries[0].payload
            request_id = payload.record.envelope.request_id
            _logger.error("the model failed on one input of request %s", request_id, exc_info=error)
            if payload.membership is not None:
                payload.membership.fault = Fault.of(error)
        else:
            _logger.warning("a run of %d inputs failed: %s", len(run.entries), type(error).__name__)
        # The frames of its traceback hold the tensors of the failed run.
        return error.with_traceback(None)

    def _note_out_of_memory(self, padded_tokens: int) -> None:
        self._gate.planner.ran_out_of_memory(padded_tokens)
        self._telemetry.count(metrics.OUT_OF_MEMORY)
        _logger.warning(
            "a run of %d padded tokens did not fit in memory; batches are limited to %d for now",
            padded_tokens,
            self._gate.planner.max_batch_tokens,
        )


class _DeviceRun:
    """One run in the device's thread."""

    def __init__(self, entries: Sequence[Entry], collated: Future[Any] | None) -> None:
        self.entries, self._collated = entries, collated
        self.started_ns = self.ended_ns = 0
        self.record: BatchRecord | None = None

    def on_device(
        self, engine: BatchEngine, begins: Callable[[], object], watched: AbstractContextManager[None]
    ) -> Run | None:
        """Run in the device's thread. Returns None if all callers are gone by now."""
        present = [entry for entry in self.entries if not entry.is_gone]
        if len(present) < len(self.entries):
            self.entries, self._collated = present, None
        if not present:
            return None
        self.started_ns = time.monotonic_ns()
        begins()
        with watched:
            collated = engine.collate(_ids(present)) if self._collated is None else self._collated.result()
            run = engine.run(collated)
        self.ended_ns = time.monotonic_ns()
        return run


def _ids(entries: Sequence[Entry]) -> list[Ids]:
    return [entry.payload.ids for entry in entries]

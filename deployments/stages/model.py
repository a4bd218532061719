"""Stage 3: token ids to model output, in batches.

The admission gate decides what runs together and when; the batch runner runs it, under ``@serve.batch``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from deployments.autoscaling.meters import BatchQueueMeter
from deployments.batching.entry import NEVER, BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import GateLimits
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.load import load_engine
from deployments.engine.protocol import Output
from deployments.errors import ApiError, DeadlinePassed, InternalError, ModelFailed
from deployments.messages import Call, Predicted, PredictRequest, Reply
from deployments.stages.batch_runner import Batched, BatchRunner, RunFailed, serve_batched
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry import metrics
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PredictRecord, RunInput, UnfinishedWait


class ModelStage:
    """One replica of the model. The constructor returns when the model is loaded and warm.

    Args:
        config: the application's configuration.
        placement: where this replica runs; by default obtained from Ray.
        batched: how batches are run; by default under ``@serve.batch``.
    """

    def __init__(
        self, config: AppConfig, *, placement: Placement | None = None, batched: Batched = serve_batched
    ) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        card = ModelCard.load(config.model)
        self._telemetry = Telemetry("model", config, card.name, placement.identity, placement.gpus)
        self._engine = load_engine(config, card, has_gpu=bool(placement.gpus), cpus=placement.cpus)
        limits = config.batching
        self._gate: AdmissionGate[RunInput] = AdmissionGate(
            GateLimits(
                limits.max_batch_size,
                limits.max_batch_tokens,
                limits.max_wait_ms,
                limits.max_queue,
                limits.max_queue_tokens,
                limits.grouping_window,
                self._engine.pad_to_multiple_of,
            )
        )
        self._runner = BatchRunner(self._engine, self._gate, self._telemetry, limits.max_batch_size, batched)
        self._in_progress: dict[str, asyncio.Task[Reply[Predicted]]] = {}
        self._is_warm = False
        try:
            self._load = self._runner.load()
        except BaseException:
            # Serve kills a replica whose constructor raises: export the reason first.
            self._telemetry.close()
            raise
        self._ready_unix_ns = time.time_ns()
        self._is_warm = True
        self._show_gauges()
        self._meter = BatchQueueMeter(self._gate, started_s)

    async def predict(
        self, calls: tuple[Call[PredictRequest], ...]
    ) -> AsyncIterator[tuple[tuple[int, Reply[Predicted]], ...]]:
        """Yield the replies, each with the index of its request, as their batches end."""
        self._runner.start()
        tasks = {asyncio.ensure_future(self._predict(call)): i for i, call in enumerate(calls)}
        pending = set(tasks)
        for task, i in tasks.items():
            self._in_progress[calls[i].envelope.carrier.traceparent] = task
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                yield tuple((tasks[task], task.result()) for task in done if not task.cancelled())
        finally:
            for task, i in tasks.items():
                task.cancel()
                self._in_progress.pop(calls[i].envelope.carrier.traceparent, None)

    async def forget(self, traceparents: tuple[str, ...]) -> None:
        """Cancel single requests of calls shared with others, as if each had been cancelled by its own caller."""
        for traceparent in traceparents:
            if traceparent in self._in_progress:
                self._in_progress[traceparent].cancel()

    async def _predict(self, call: Call[PredictRequest]) -> Reply[Predicted]:
        outputs: tuple[Output, ...] | None = None
        request = call.request
        with self._telemetry.stage(PredictRecord(call.envelope)) as record:
            self._note_cold_start(record)
            entries = [BatchEntry(RunInput(record, ids), len(ids), record.deadline_ns) for ids in request.ids]
            self._meter.arrive(request.ids.lengths)
            try:
                async with asyncio.timeout(call.envelope.remaining_ms / 1000):
                    outcomes = await self._gate.submit(entries)
            except TimeoutError:
                raise DeadlinePassed("the deadline passed in the model replica") from None
            finally:
                record.unfinished = _unfinished_wait(entries)
            outputs = tuple(_output(outcome, i, request.param) for i, outcome in enumerate(outcomes))
        if outputs is None:
            return record.reply(None)
        return record.reply(Predicted(outputs, record.forward_ns(), self._engine.device))

    def _note_cold_start(self, record: PredictRecord) -> None:
        """A request sent before this replica was ready waited in the caller's router for the model load."""
        if record.envelope.sent_unix_ns < self._ready_unix_ns:
            record.load = self._load.context

    # --- what Serve and operators see ---

    async def check_health(self) -> None:
        """Called by Serve: a replica that can run no further batch is replaced."""
        if self._runner.broken is not None:
            raise RuntimeError(self._runner.broken)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report().stats()

    async def queue_state(self) -> dict[str, float]:
        """Current state of the queue: inputs ``waiting`` and ``running``, and ``oldest_age_ms``."""
        gate = self._gate
        return {"waiting": gate.depth, "running": gate.running, "oldest_age_ms": gate.oldest_age_ms}

    def _show_gauges(self) -> None:
        self._telemetry.gauge(metrics.QUEUE_DEPTH, lambda: [(self._gate.depth, {})])
        self._telemetry.gauge(metrics.QUEUE_AGE, lambda: [(self._gate.oldest_age_ms, {})])
        self._telemetry.gauge(metrics.REPLICAS_WARM, lambda: [(int(self._is_warm), {})])

    def __del__(self) -> None:
        self._is_warm = False
        if hasattr(self, "_runner"):
            self._runner.close()
        if hasattr(self, "_telemetry"):
            self._telemetry.close()


def _unfinished_wait(entries: Sequence[BatchEntry[RunInput]]) -> UnfinishedWait | None:
    """The wait of the first input that was queued and never ran."""
    for entry in entries:
        if entry.is_gone and entry.arrived_ns != NEVER:
            return UnfinishedWait(
                entry.arrived_ns, entry.left_ns, entry.depth_on_arrival, entry.busy_wait_ns, entry.fill_wait_ns
            )
    return None


def _output(outcome: Any, index: int, param: str) -> Output:
    """Return the output of one input, or raise the error that its request fails with."""
    if isinstance(outcome, ApiError):
        raise outcome
    if isinstance(outcome, RunFailed):
        raise ModelFailed(
            f"the model failed on {param}[{index}] ({type(outcome.__cause__).__name__}); the rest of its batch is "
            "not affected",
            param=param,
        ) from outcome.__cause__
    if isinstance(outcome, BaseException):
        raise InternalError("internal error") from outcome
    return outcome

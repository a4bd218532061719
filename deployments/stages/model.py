"""Stage 3: token ids to model output, in batches.

The admission gate decides what runs together and when; the batch runner runs it, under ``@serve.batch``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from deployments.autoscaling.meters import BatchQueueMeter
from deployments.batching.entry import NEVER, BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import limits_of
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.load import load_engine
from deployments.engine.protocol import Output
from deployments.errors import ApiError, DeadlinePassed, InternalError, ModelFailed
from deployments.messages import Envelope, Predicted, PredictRequest, Reply
from deployments.stages.batch_runner import Batched, BatchRunner, RunFailed, serve_batched
from deployments.stages.channel_stage import ChannelStage
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry import metrics
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PredictRecord, RunInput, UnfinishedWait
from deployments.transport.server import QueueState


class ModelStage(ChannelStage):
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
        self._gate: AdmissionGate[RunInput] = AdmissionGate(limits_of(limits, self._engine.pad_to_multiple_of))
        self._runner = BatchRunner(self._engine, self._gate, self._telemetry, limits.max_batch_size, batched)
        self._is_warm = False
        try:
            self._load = self._runner.load()
        except BaseException:
            # Serve kills a replica whose constructor raises: export the reason first.
            self._telemetry.close()
            raise
        self._ready_ns = time.monotonic_ns()
        self._is_warm = True
        self._show_gauges()
        self._meter = BatchQueueMeter(self._gate, started_s)
        self._serve(
            lambda envelope, request, _: self.predict(envelope, request),
            PredictRequest,
            config,
            placement,
            self._telemetry,
            self._queue,
        )

    async def predict(self, envelope: Envelope, request: PredictRequest) -> Reply[Predicted]:
        self._runner.start()
        outputs: tuple[Output, ...] | None = None
        with self._telemetry.stage(PredictRecord(envelope)) as record:
            self._note_cold_start(record)
            share = request.share
            entries = [BatchEntry(RunInput(record, ids), len(ids), record.deadline_ns, share) for ids in request.ids]
            self._meter.arrive(request.ids.lengths)
            try:
                async with asyncio.timeout((envelope.deadline_ns - time.monotonic_ns()) / 1e9):
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
        """A request that began to wait for a replica before this one was ready has waited for its load.

        Its caller tells how long it waited, so that only this process's clock is read.
        """
        if record.started_ns - record.envelope.waited_ns < self._ready_ns:
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

    def _queue(self) -> QueueState:
        return QueueState(self._gate.wait_ns() / 1e6, self._gate.is_full, self._runner.is_stuck)

    def _release(self) -> None:
        self._is_warm = False
        self._runner.close()


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

"""Stage 3: token ids to model output, in batches.

The admission gate decides what runs together and when; ``@serve.batch`` runs it. The gate releases one batch's inputs
in one tick of the loop, so the batch that Serve forms is the batch that the gate cut.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve

from deployments.batching import NEVER, AdmissionGate, GateLimits, Item
from deployments.config import AppConfig
from deployments.engine.base import Output
from deployments.engine.card import ModelCard
from deployments.engine.load import load_engine
from deployments.errors import ApiError, DeadlinePassed, InternalError, ModelFailed
from deployments.messages import Predicted, PredictRequest, Reply
from deployments.replica import placement
from deployments.telemetry import names
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import Fault, Membership, PredictRecord, RunInput, UnfinishedWait

_logger = logging.getLogger("slowlens.model")
Queued = Item[RunInput]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one input ended. Returned, not raised: an exception in a batch would fail every input in it."""

    output: Output = None
    error: Exception | None = None


class ModelStage:
    def __init__(self, config: AppConfig) -> None:
        place = placement()
        self._card = ModelCard.load(config.model)
        self._telemetry = Telemetry("model", config, self._card.name, place.identity, place.gpus)
        self._engine = load_engine(config, self._card, has_gpu=bool(place.gpus), cpus=place.cpus)
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slowlens-device")
        self._in_hand: dict[str, asyncio.Task[Reply[Predicted]]] = {}
        self._warm = False
        try:
            self._load()
        except BaseException:
            # Serve kills a replica whose constructor raises: say why before that.
            self._telemetry.close()
            raise
        limits = config.batching
        # Decorated here and not on the class: the batch queue belongs to one function and one event loop.
        run_batch = serve.batch(max_batch_size=limits.max_batch_size, batch_wait_timeout_s=0)(self._run_batch)
        self._gate: AdmissionGate[RunInput] = AdmissionGate(
            GateLimits(limits.max_batch_size, limits.max_batch_tokens, limits.max_wait_ms, limits.max_queue),
            run_batch,
        )
        self._show_gauges()

    def _load(self) -> None:
        """Load and warm up, in the thread that will run the model. Only then does the replica count as ready."""
        with self._telemetry.model_load() as record:
            record.device = self._engine.device
            self._device_thread.submit(
                self._engine.load, lambda name: self._telemetry.load_phase(record, name)
            ).result()
            memory = self._engine.memory()
            if memory is not None:
                record.memory_allocated_gb, record.memory_reserved_gb = (
                    memory.allocated_gb,
                    memory.reserved_gb,
                )
        self._load_context = record.context
        self._ready_unix_ns = time.time_ns()
        self._warm = True

    async def predict(
        self, requests: tuple[PredictRequest, ...]
    ) -> AsyncIterator[tuple[tuple[int, Reply[Predicted]], ...]]:
        """Yields the replies, with the place of their request, as the batches that they were in end."""
        tasks = {asyncio.ensure_future(self._predict(request)): i for i, request in enumerate(requests)}
        pending = set(tasks)
        for task, i in tasks.items():
            self._in_hand[requests[i].envelope.carrier.traceparent] = task
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                yield tuple((tasks[task], task.result()) for task in done if not task.cancelled())
        finally:
            for task, i in tasks.items():
                task.cancel()
                self._in_hand.pop(requests[i].envelope.carrier.traceparent, None)

    async def forget(self, traceparents: tuple[str, ...]) -> None:
        """Give up requests that share a call with others, as if their callers had cancelled them alone."""
        for traceparent in traceparents:
            if traceparent in self._in_hand:
                self._in_hand[traceparent].cancel()

    async def _predict(self, request: PredictRequest) -> Reply[Predicted]:
        outputs: tuple[Output, ...] | None = None
        with self._telemetry.stage(PredictRecord(request.envelope)) as record:
            self._note_cold_start(record)
            items = [Item(RunInput(record, ids), len(ids), record.deadline_ns) for ids in request.ids]
            try:
                async with asyncio.timeout(request.envelope.remaining_ms / 1000):
                    outcomes = await self._gate.submit(items)
            except TimeoutError:
                raise DeadlinePassed("the deadline passed in the model replica") from None
            finally:
                record.unfinished = _unfinished_wait(items)
            outputs = tuple(_output(outcome, i, request.param) for i, outcome in enumerate(outcomes))
        if outputs is None:
            return record.reply(None)
        return record.reply(Predicted(outputs, record.forward_ns(), self._engine.device))

    def _note_cold_start(self, record: PredictRecord) -> None:
        """A request sent before this replica was ready waited for its load, though in the caller's router."""
        if record.envelope.sent_unix_ns < self._ready_unix_ns:
            record.load = self._load_context

    # --- one batch ---

    async def _run_batch(self, items: list[Queued]) -> list[_Outcome]:
        """Runs under ``@serve.batch``: what Serve hands over together runs together."""
        try:
            started_ns = self._gate.begin(items)
            memberships = self._telemetry.batch_begins(items, started_ns)
            outcomes = await self._run_isolated(items, memberships, started_ns)
        except Exception as error:
            # Not a fault of the model, those are isolated: of ours. It still must not fail inside Serve's batcher.
            _logger.exception("a batch of %d failed", len(items))
            outcomes = dict.fromkeys(map(id, items), _Outcome(error=error))
        finally:
            self._gate.end(items)
        return [outcomes[id(item)] for item in items]

    async def _run_isolated(
        self, items: Sequence[Queued], memberships: Mapping[int, Membership], started_ns: int
    ) -> dict[int, _Outcome]:
        """Run the inputs together. If the run fails, run each half, until the input at fault is alone."""
        try:
            with self._telemetry.batch_run(items, memberships, started_ns) as record:
                loop = asyncio.get_running_loop()
                run = await loop.run_in_executor(
                    self._device_thread, self._engine.run, [item.payload.ids for item in items]
                )
                record.device, record.inference_ms = self._engine.device, run.inference_ms
                record.output_shape, record.peak_memory_gb = run.output_shape, run.peak_memory_gb
                record.padded_tokens = run.padded_tokens
            return {id(item): _Outcome(output) for item, output in zip(items, run.outputs, strict=True)}
        except Exception as error:
            failure = self._note_failure(error, items, memberships)
        # Out of the handler, which would keep the failed run's tensors alive while its halves run.
        if len(items) == 1 or self._engine.broken is not None:
            return dict.fromkeys(map(id, items), _Outcome(error=failure))
        half = len(items) // 2
        first = await self._run_isolated(items[:half], memberships, time.monotonic_ns())
        return first | await self._run_isolated(items[half:], memberships, time.monotonic_ns())

    def _note_failure(
        self, error: Exception, items: Sequence[Queued], memberships: Mapping[int, Membership]
    ) -> Exception:
        if len(items) == 1:
            record = items[0].payload.record
            _logger.error("the model failed on one input of request %s", record.envelope.request_id, exc_info=error)
            memberships[id(record)].fault = Fault.of(error)
        else:
            _logger.warning("a run of %d inputs failed: %s", len(items), type(error).__name__)
        # Its frames hold the tensors of the failed run.
        return error.with_traceback(None)

    # --- what operators see ---

    async def check_health(self) -> None:
        """Asked by Serve: a replica whose device is beyond use is replaced."""
        if self._engine.broken is not None:
            raise RuntimeError(f"the device can be used no more: {self._engine.broken}")

    async def queue_state(self) -> dict[str, float]:
        """The queue as it is now: inputs ``waiting`` and ``running``, and ``oldest_age_ms``."""
        gate = self._gate
        return {"waiting": gate.depth, "running": gate.running, "oldest_age_ms": gate.oldest_age_ms}

    def _show_gauges(self) -> None:
        self._telemetry.gauge(names.QUEUE_DEPTH, lambda: [(self._gate.depth, {})])
        self._telemetry.gauge(names.QUEUE_AGE, lambda: [(self._gate.oldest_age_ms, {})])
        self._telemetry.gauge(names.REPLICAS_WARM, lambda: [(int(self._warm), {})])

    def __del__(self) -> None:
        self._warm = False
        if hasattr(self, "_device_thread"):
            self._device_thread.shutdown(wait=False)
        if hasattr(self, "_telemetry"):
            self._telemetry.close()


def _unfinished_wait(items: Sequence[Queued]) -> UnfinishedWait | None:
    """Of the first input that was queued and never ran."""
    for item in items:
        if item.left_ns != NEVER and item.arrived_ns != NEVER:
            return UnfinishedWait(
                item.arrived_ns, item.left_ns, item.depth_on_arrival, item.busy_wait_ns, item.fill_wait_ns
            )
    return None


def _output(outcome: Any, index: int, param: str) -> Output:
    """The output of one input, or the error that the request fails with because of it."""
    if isinstance(outcome, ApiError):
        raise outcome
    if isinstance(outcome, BaseException):
        raise InternalError("internal error") from outcome
    if outcome.error is not None:
        raise ModelFailed(
            f"the model failed on {param}[{index}] ({type(outcome.error).__name__}); the rest of its batch is unharmed",
            param=param,
        ) from outcome.error
    return outcome.output

"""Stage 3: token ids to model output, in batches.

The admission gate decides what runs together and when; ``@serve.batch`` runs it. The gate releases one batch's inputs
in one tick of the loop, so the batch that Serve forms is the batch that the gate cut.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve

from deployments.autoscaling.meters import GateLoad
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import NEVER, GateLimits, Item
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.load import load_engine
from deployments.engine.protocol import Engine, OutOfMemory, Output, Run, WarmUp
from deployments.errors import ApiError, DeadlinePassed, InternalError, ModelFailed
from deployments.messages import Ids, Predicted, PredictRequest, Reply
from deployments.stages.replica import placement
from deployments.telemetry import names
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    Membership,
    PredictRecord,
    RunInput,
    UnfinishedWait,
)

_logger = logging.getLogger("slowlens.model")
Queued = Item[RunInput]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one input ended. Returned, not raised: an exception in a batch would fail every input in it."""

    output: Output = None
    error: Exception | None = None


_NOT_RUN = _Outcome(error=InternalError("the input was given up before it ran"))


class _DeviceRun:
    """One run on its way through the device's thread."""

    def __init__(self, items: Sequence[Queued], collated: Future[Any] | None) -> None:
        self.items, self._collated = items, collated
        self.started_ns = self.ended_ns = 0
        self.record: BatchRecord | None = None

    def on_device(self, engine: Engine, begins: Callable[[], object]) -> Run | None:
        """In the device's thread. None where all who wanted it are gone by now."""
        present = [item for item in self.items if not item.is_gone]
        if len(present) < len(self.items):
            self.items, self._collated = present, None
        if not present:
            return None
        self.started_ns = time.monotonic_ns()
        begins()
        collated = engine.collate(_ids(present)) if self._collated is None else self._collated.result()
        run = engine.run(collated)
        self.ended_ns = time.monotonic_ns()
        return run


class ModelStage:
    def __init__(self, config: AppConfig) -> None:
        started_s = time.monotonic()
        place = placement()
        self._card = ModelCard.load(config.model)
        self._telemetry = Telemetry("model", config, self._card.name, place.identity, place.gpus)
        self._engine = load_engine(config, self._card, has_gpu=bool(place.gpus), cpus=place.cpus)
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slowlens-device")
        self._collate_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slowlens-collate")
        self._in_hand: dict[str, asyncio.Task[Reply[Predicted]]] = {}
        self._warm = False
        try:
            warm_up = self._load()
        except BaseException:
            # Serve kills a replica whose constructor raises: say why before that.
            self._telemetry.close()
            raise
        limits = config.batching
        # Decorated here and not on the class: the batch queue belongs to one function and one event loop.
        # Two at once: one runs, and at most one full batch is ready to follow it.
        run_batch = serve.batch(max_batch_size=limits.max_batch_size, batch_wait_timeout_s=0, max_concurrent_batches=2)(
            _with_signature(self._run_batch)
        )
        self._gate: AdmissionGate[RunInput] = AdmissionGate(
            GateLimits(
                limits.max_batch_size,
                limits.max_batch_tokens,
                limits.max_wait_ms,
                limits.max_queue,
                limits.max_queue_tokens,
                limits.grouping_window,
                self._engine.pad_to_multiple_of,
            ),
            run_batch,
        )
        self._gate.cutter.cost.fit(warm_up.runs)
        if warm_up.too_large is not None:
            self._note_out_of_memory(warm_up.too_large)
        self._show_gauges()
        self._load_meter = GateLoad(self._gate, started_s)

    def _load(self) -> WarmUp:
        """Load and warm up, in the thread that will run the model. Only then does the replica count as ready."""
        with self._telemetry.model_load() as record:
            record.device = self._engine.device
            warm_up = self._device_thread.submit(
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
        return warm_up

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
            self._load_meter.arrive(request.ids.lengths)
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
        collated = None
        if self._gate.is_busy:
            # This batch is the one that is ready to follow: its collation and its copies overlap the run before.
            collated = self._collate_thread.submit(self._engine.collate, _ids(items))
        try:
            outcomes = await self._run_isolated(items, {}, collated)
        except Exception as error:
            # Not a fault of the model, those are isolated: of ours. It still must not fail inside Serve's batcher.
            _logger.exception("a batch of %d failed", len(items))
            outcomes = dict.fromkeys(map(id, items), _Outcome(error=error))
        finally:
            self._gate.end(items)
        return [outcomes.get(id(item), _NOT_RUN) for item in items]

    async def _run_isolated(
        self, items: Sequence[Queued], memberships: dict[int, Membership], collated: Future[Any] | None = None
    ) -> dict[int, _Outcome]:
        """Run the inputs together. If the run fails, run each half, until the input at fault is alone."""
        loop, run = asyncio.get_running_loop(), _DeviceRun(items, collated)
        begins = functools.partial(loop.call_soon_threadsafe, self._run_begins, run, memberships)
        try:
            result = await loop.run_in_executor(self._device_thread, run.on_device, self._engine, begins)
            if result is None or run.record is None:
                return {}
            record = run.record
            record.device, record.inference_ms = self._engine.device, result.inference_ms
            record.output_shape, record.peak_memory_gb = result.output_shape, result.peak_memory_gb
            record.padded_tokens = result.padded_tokens
            self._gate.cutter.observe(result.padded_tokens, run.ended_ns - run.started_ns)
            self._telemetry.run_ends(record, run.ended_ns)
            return {id(item): _Outcome(output) for item, output in zip(run.items, result.outputs, strict=True)}
        except Exception as error:
            failure = self._note_failure(error, run, memberships)
        # Out of the handler, which would keep the failed run's tensors alive while its halves run.
        items = run.items
        if len(items) == 1 or self._engine.broken is not None:
            return dict.fromkeys(map(id, items), _Outcome(error=failure))
        half = len(items) // 2
        first = await self._run_isolated(items[:half], memberships)
        return first | await self._run_isolated(items[half:], memberships)

    def _run_begins(self, run: _DeviceRun, memberships: dict[int, Membership]) -> None:
        """On the loop, while the run is going. The first run of a batch is where its inputs stop waiting."""
        if not memberships:
            # A caller may have gone in the moment between the thread's look and now; what it waited is written down.
            wanted = [item for item in run.items if not item.is_gone]
            self._gate.begin(wanted, run.started_ns)
            memberships.update(self._telemetry.batch_begins(wanted, run.started_ns))
        padded_tokens = self._gate.cutter.padded_tokens(run.items)
        run.record = self._telemetry.run_begins(run.items, memberships, padded_tokens, run.started_ns)

    def _note_failure(self, error: Exception, run: _DeviceRun, memberships: Mapping[int, Membership]) -> Exception:
        if run.record is not None:
            self._telemetry.run_ends(run.record, time.monotonic_ns(), error)
        if isinstance(error, OutOfMemory):
            self._note_out_of_memory(self._gate.cutter.padded_tokens(run.items))
        if len(run.items) == 1:
            record = run.items[0].payload.record
            _logger.error("the model failed on one input of request %s", record.envelope.request_id, exc_info=error)
            if id(record) in memberships:
                memberships[id(record)].fault = Fault.of(error)
        else:
            _logger.warning("a run of %d inputs failed: %s", len(run.items), type(error).__name__)
        # Its frames hold the tensors of the failed run.
        return error.with_traceback(None)

    def _note_out_of_memory(self, padded_tokens: int) -> None:
        self._gate.cutter.ran_out_of_memory(padded_tokens)
        self._telemetry.count(names.OUT_OF_MEMORY)
        _logger.warning(
            "a run of %d padded tokens did not fit the memory; batches stay below %d for now",
            padded_tokens,
            self._gate.cutter.max_batch_tokens,
        )

    # --- what operators see ---

    async def check_health(self) -> None:
        """Asked by Serve: a replica whose device is beyond use is replaced."""
        if self._engine.broken is not None:
            raise RuntimeError(f"the device can be used no more: {self._engine.broken}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the autoscaling policy."""
        return self._load_meter.load().stats()

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
        for thread in ("_device_thread", "_collate_thread"):
            if hasattr(self, thread):
                getattr(self, thread).shutdown(wait=False)
        if hasattr(self, "_telemetry"):
            self._telemetry.close()


def _with_signature(run: Callable[[list[Queued]], Awaitable[list[_Outcome]]]) -> Any:
    """``@serve.batch`` asks for the function's signature at every call; so it need not be worked out each time."""

    async def run_batch(items: list[Queued]) -> list[_Outcome]:
        return await run(items)

    run_batch.__signature__ = inspect.signature(run_batch)  # type: ignore[attr-defined]
    return run_batch


def _ids(items: Sequence[Queued]) -> list[Ids]:
    return [item.payload.ids for item in items]


def _unfinished_wait(items: Sequence[Queued]) -> UnfinishedWait | None:
    """Of the first input that was queued and never ran."""
    for item in items:
        if item.is_gone and item.arrived_ns != NEVER:
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

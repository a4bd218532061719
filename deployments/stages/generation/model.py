"""Stage 3 for language models: a prompt to tokens, step by step, with everybody else's.

The path of a generation is ``generate``; ``_deliver`` hands it what each step gave.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time

from msgspec import structs

from deployments.autoscaling.meters import GenerationMeter
from deployments.batching.fairness import may_hold
from deployments.batching.generation.steps import Cache, Sequence
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.load import load_generator
from deployments.engine.protocol import Sampled
from deployments.errors import (
    ApiError,
    DeadlinePassed,
    Failure,
    InternalError,
    InvalidField,
    ModelFailed,
    NoReplicaReady,
    QueueFull,
)
from deployments.messages import (
    Envelope,
    FinishReason,
    Generated,
    GenerateRequest,
    Reply,
    Sampling,
    TokenDelta,
    TokenDeltas,
    TokenLogprobs,
)
from deployments.stages.channel_stage import ChannelStage
from deployments.stages.generation.step_runner import (
    Failed,
    Idle,
    Report,
    StepReport,
    StepRunner,
    Stopped,
)
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry import metrics
from deployments.telemetry.generation.records import GenerateRecord
from deployments.telemetry.generation.steps import StepTelemetry
from deployments.telemetry.recorder import Telemetry
from deployments.transport.server import Chunks, QueueState

_MAX_RETRY_S = 60
_logger = logging.getLogger("slowlens.model")


class _Choice:
    """One choice of a call, on the event loop."""

    def __init__(self, call: _Call, sequence: Sequence, record: GenerateRecord) -> None:
        self.call, self.sequence, self.record = call, sequence, record
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.is_over = False

    def add(self, sampled: Sampled, reason: FinishReason | None) -> None:
        self.tokens.append(sampled.token)
        # The token that ends a text is none of it.
        if sampled.logprobs is not None and reason != "stop":
            self.logprobs.append(sampled.logprobs)

    def take(self) -> TokenDelta | None:
        """What is new; None if nothing is."""
        if not self.tokens and self.finish_reason is None:
            return None
        delta = TokenDelta(self.record.choice, tuple(self.tokens), tuple(self.logprobs), self.finish_reason)
        self.tokens, self.logprobs, self.finish_reason = [], [], None
        return delta


class _Call:
    """One call: its choices, and whether something is new."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.choices: list[_Choice] = []
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self.deferred: list[_Choice] = []
        """Choices that begin when the first has its first token: then its prompt is in the cache."""

    @property
    def is_over(self) -> bool:
        return all(choice.is_over for choice in self.choices)

    def take(self) -> TokenDeltas:
        first = self.choices[0].record
        deltas = tuple(delta for choice in self.choices if (delta := choice.take()) is not None)
        newest_ns = max(choice.record.last_token_ns for choice in self.choices)
        return TokenDeltas(
            deltas, first.queue_ns, first.prefill_ns, newest_ns - first.first_token_ns, first.cached_tokens
        )


class GeneratorStage(ChannelStage):
    """One replica of a language model. The constructor returns when the model is loaded and warm.

    Args:
        config: the application's configuration.
        placement: where this replica runs; by default obtained from Ray.
    """

    def __init__(self, config: AppConfig, *, placement: Placement | None = None) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        self._config = config
        card = ModelCard.load(config.model)
        telemetry = Telemetry("model", config, card.name, placement.identity, placement.gpus)
        self._engine = load_generator(config, card, has_gpu=bool(placement.gpus), cpus=placement.cpus)
        self._steps = StepTelemetry(telemetry, self._engine.device)
        self._runner = StepRunner(self._engine, telemetry, config.generation, self._deliver)
        self._is_warm = False
        try:
            self._load = self._runner.load()
        except BaseException:
            # Serve kills a replica whose constructor raises: export the reason first.
            telemetry.close()
            raise
        self._ready_ns = time.monotonic_ns()
        self._is_warm = True
        self._numbers = itertools.count(1)
        self._choices: dict[int, _Choice] = {}
        self._waiting = 0
        self._kv_used_ratio = 0.0
        self._meter = GenerationMeter(self._runner.planner.cost, config.generation.max_sequences, started_s)
        self._show_gauges(telemetry)
        self._serve(self.generate, GenerateRequest, config, placement, telemetry, self._queue)

    async def generate(self, envelope: Envelope, request: GenerateRequest, chunks: Chunks) -> Reply[Generated]:
        """Generate all choices of a request, sending tokens as they come."""
        self._runner.start()
        call = _Call(request.sampling)
        call.choices = [self._new_choice(call, envelope, request, index) for index in range(request.choices)]
        failure: BaseException | None = None
        try:
            self._admit(call, request)
            async with asyncio.timeout((envelope.deadline_ns - time.monotonic_ns()) / 1e9):
                await self._send(call, request, chunks)
        except TimeoutError:
            failure = DeadlinePassed("the deadline passed while the model generated")
        except Exception as error:
            failure = error
            if not isinstance(error, ApiError):
                _logger.exception("the generation of request %s failed", envelope.request_id)
        except BaseException as error:
            failure = error
            raise
        finally:
            for choice in call.choices:
                self._forget(choice, failure)
        return self._reply(call, failure)

    async def _send(self, call: _Call, request: GenerateRequest, chunks: Chunks) -> None:
        """Send what is new, as long as there is something to come. Whatever comes while a chunk waits to be sent goes
        into the next one."""
        chunks.on_enough = lambda choice: self._end_early(call, choice)
        while True:
            await call.changed.wait()
            call.changed.clear()
            if call.error is not None:
                raise call.error
            # Sending may wait, and more may come meanwhile.
            is_last = call.is_over
            if request.is_streamed or is_last:
                await chunks.send(call.take())
            if is_last:
                return

    def _deliver(self, report: Report) -> None:
        """Called on the event loop with what happened in the device's thread."""
        if isinstance(report, Idle):
            self._steps.idle()
        elif isinstance(report, Failed):
            self._note_failure(report)
        elif isinstance(report, Stopped):
            self._note_stop()
        else:
            self._note_step(report)

    def _note_step(self, report: StepReport) -> None:
        members = [
            (self._present(member.sequence), member, sampled)
            for member, sampled in zip(report.plan.members, report.sampled, strict=True)
        ]
        for sequence in report.plan.preempted:
            if (choice := self._present(sequence)) is not None:
                self._steps.lost(choice.record, report.started_ns)
        for choice, member, _ in members:
            if choice is not None and not choice.record.first_step_ns:
                self._note_start(choice, member.sequence, report.started_ns)
        if members:
            prefilling = [(c.record, m.tokens) for c, m, _ in members if c is not None and m.is_prefill]
            decoding = [c.record for c, m, _ in members if c is not None and not m.is_prefill]
            if prefilling or decoding:
                self._steps.step(
                    report.started_ns, report.ended_ns, prefilling, decoding, report.waiting, report.kv_used_ratio
                )
        finished = {sequence.number: reason for sequence, reason in report.finished}
        for choice, member, sampled in members:
            if choice is not None and sampled is not None:
                self._note_token(choice, sampled, finished.get(member.sequence.number), report.ended_ns)
        self._kv_used_ratio = report.kv_used_ratio

    def _present(self, sequence: Sequence) -> _Choice | None:
        """The choice whose sequence it is, if more of it is wanted."""
        choice = self._choices.get(sequence.number)
        return choice if choice is not None and not choice.is_over else None

    def _note_start(self, choice: _Choice, sequence: Sequence, at_ns: int) -> None:
        record = choice.record
        self._waiting -= 1
        record.cached_tokens = sequence.cached
        if sequence.cache_since_ns:
            record.cache_wait_ns = at_ns - max(record.started_ns, sequence.cache_since_ns)

    def _note_token(self, choice: _Choice, sampled: Sampled, reason: FinishReason | None, at_ns: int) -> None:
        self._steps.token(choice.record, at_ns)
        for other in choice.call.deferred:
            # Only from now on it waits for itself, and not for the first.
            other.record.started_ns = at_ns
            self._submit(other)
        choice.call.deferred.clear()
        choice.add(sampled, reason)
        if reason is not None:
            choice.finish_reason, choice.is_over = reason, True
            choice.record.finish_reason = reason
            self._meter.finished(choice.sequence.max_tokens, choice.record.tokens)
        choice.call.changed.set()

    def _note_failure(self, failed: Failed) -> None:
        choice = self._present(failed.sequence)
        if choice is not None:
            error = ModelFailed(f"the model failed on this request ({type(failed.error).__name__})")
            error.__cause__ = failed.error
            choice.call.error = error
            choice.call.changed.set()

    def _note_stop(self) -> None:
        """No step will follow: nobody must wait for one."""
        for choice in self._choices.values():
            choice.call.error = NoReplicaReady("this replica of the model has failed; try again", retry_after_s=5)
            choice.call.changed.set()

    # --- admission and end ---

    def _new_choice(self, call: _Call, envelope: Envelope, request: GenerateRequest, index: int) -> _Choice:
        record = self._steps.begin(envelope, index, self._waiting)
        if record.started_ns - envelope.waited_ns < self._ready_ns:
            record.load = self._load.context
        sequence = Sequence(next(self._numbers), request.ids.tolist(), request.max_tokens, request.share)
        return _Choice(call, sequence, record)

    def _admit(self, call: _Call, request: GenerateRequest) -> None:
        """Submit all choices.

        Raises InvalidField if they can never run, QueueFull if too many wait, NoReplicaReady if nothing runs any more.
        """
        if self._runner.broken is not None:
            raise NoReplicaReady("this replica of the model is being replaced; try again", retry_after_s=5)
        if not self._runner.planner.fits(len(request.ids), request.max_tokens):
            raise InvalidField(
                f"{request.param} and its output of at most {request.max_tokens} tokens need "
                f"{len(request.ids) + request.max_tokens} tokens of the KV cache, which holds "
                f"{self._engine.cache.capacity}",
                param=request.param,
            )
        self._meter.arrive(request.choices, len(request.ids), request.max_tokens)
        most, tenant = self._config.generation.max_queue, request.share.tenant
        problem = ""
        if self._waiting + request.choices > most and self._waiting:
            problem = f"{self._waiting} sequences wait in this replica; at most {most} may"
        elif not may_hold(request.share, self._held(tenant), request.choices, self._waiting, most):
            problem = f"{self._held(tenant)} sequences of {tenant!r} wait in this replica; its share is used up"
        if problem:
            raise QueueFull(problem, retry_after_s=self._retry_after_s())
        for choice in call.choices:
            self._waiting += 1
            self._choices[choice.sequence.number] = choice
            self._meter.queued(len(request.ids), request.max_tokens)
        self._submit(call.choices[0])
        if len(request.ids) > self._engine.cache.page:
            call.deferred = call.choices[1:]
        else:
            for choice in call.choices[1:]:
                self._submit(choice)

    def _held(self, tenant: str) -> int:
        """Sequences of a tenant that wait."""
        return sum(
            choice.sequence.share.tenant == tenant and not choice.record.first_step_ns
            for choice in self._choices.values()
        )

    def _submit(self, choice: _Choice) -> None:
        sampling = choice.call.sampling
        if sampling.seed is not None and choice.record.choice:
            sampling = structs.replace(sampling, seed=sampling.seed + choice.record.choice)
        self._runner.submit(choice.sequence, sampling)

    def _retry_after_s(self) -> int:
        return max(1, min(_MAX_RETRY_S, math.ceil(self._queue().wait_ms / 1e3)))

    def _end_early(self, call: _Call, index: int) -> None:
        """The caller has enough of this choice: a stop string was found."""
        choice = call.choices[index]
        if not choice.is_over:
            choice.is_over = True
            choice.record.finish_reason = "stop"
            choice.tokens, choice.logprobs = [], []
            self._runner.cancel(choice.sequence)
            self._meter.finished(choice.sequence.max_tokens, choice.record.tokens)
            call.changed.set()

    def _forget(self, choice: _Choice, failure: BaseException | None) -> None:
        """However the call ended: nothing of it is left in the queue, the cache, or here."""
        number = choice.sequence.number
        if self._choices.pop(number, None) is not None:
            self._runner.cancel(choice.sequence)
            if not choice.record.first_step_ns:
                self._waiting -= 1
            self._meter.left(len(choice.sequence.prompt), choice.sequence.max_tokens)
        self._steps.end(choice.record, None if choice.is_over else failure)

    def _reply(self, call: _Call, failure: BaseException | None) -> Reply[Generated]:
        records = [choice.record for choice in call.choices]
        held_ns = time.monotonic_ns() - records[0].started_ns
        if failure is not None:
            error = failure if isinstance(failure, ApiError) else InternalError("internal error")
            return Reply(held_ns, failure=Failure.of(error))
        return Reply(held_ns, Generated(self._engine.device))

    # --- what Serve and operators see ---

    @property
    def pending(self) -> int:
        """Sequences that wait or are generated."""
        return len(self._choices)

    @property
    def cache(self) -> Cache:
        return self._engine.cache

    async def check_health(self) -> None:
        """Called by Serve: a replica that can run no further step is replaced."""
        if self._runner.broken is not None:
            raise RuntimeError(self._runner.broken)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report(self._waiting, self._oldest_age_ms()).stats()

    def _oldest_age_ms(self) -> float:
        waiting = (c.record.started_ns for c in self._choices.values() if not c.record.first_step_ns)
        oldest_ns = min(waiting, default=None)
        return (time.monotonic_ns() - oldest_ns) / 1e6 if oldest_ns is not None else 0.0

    def _show_gauges(self, telemetry: Telemetry) -> None:
        telemetry.gauge(metrics.QUEUE_DEPTH, lambda: [(self._waiting, {})])
        telemetry.gauge(metrics.QUEUE_AGE, lambda: [(self._oldest_age_ms(), {})])
        telemetry.gauge(metrics.REPLICAS_WARM, lambda: [(int(self._is_warm), {})])
        telemetry.gauge(metrics.RUNNING, lambda: [(len(self._choices) - self._waiting, {})])
        telemetry.gauge(metrics.KV_USED, lambda: [(self._kv_used_ratio if self._choices else 0.0, {})])

    def _queue(self) -> QueueState:
        is_full = self._waiting >= self._config.generation.max_queue
        return QueueState(self._meter.queue_wait_ms(), is_full, self._runner.is_stuck)

    def _release(self) -> None:
        self._is_warm = False
        self._steps.idle()
        self._runner.close()

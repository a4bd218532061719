"""The telemetry interface of the stages: one injected object with a context manager for each kind of work.

Inside a ``with`` block a stage only works and fills in its record. However the block ends, the record is complete and
queued; a thread turns it into spans and measurements later. An unsampled request costs only a few clock readings.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context

import deployments.telemetry.generation.spans  # noqa: F401 (registers them)
from deployments.batching.entry import Batch, BatchEntry
from deployments.config import AppConfig
from deployments.errors import ApiError, InternalError
from deployments.messages import Carrier
from deployments.telemetry import metrics, names
from deployments.telemetry.carrier import child_of, from_carrier, from_headers, is_sampled, to_carrier
from deployments.telemetry.export.drain import MAX_RECORDS, Drain
from deployments.telemetry.export.provider import Provider, ReplicaIdentity
from deployments.telemetry.gauges.counters import CPUS, Counter, busy, pressure, stolen, throttled
from deployments.telemetry.gauges.cpu import RunDelay
from deployments.telemetry.gauges.garbage import GarbageWatch
from deployments.telemetry.gauges.instruments import show_gpus, show_process, show_run_delay, show_shortages
from deployments.telemetry.gauges.nvml import GpuReader
from deployments.telemetry.gauges.stalls import StallWatch
from deployments.telemetry.measures import Measures, Reading
from deployments.telemetry.metrics import MetricSpec
from deployments.telemetry.names import Service
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    HopRecord,
    Interval,
    Membership,
    ModelLoadRecord,
    PredictRecord,
    RequestRecord,
    RunInput,
    StageRecord,
    translate_cancellation,
)
from deployments.telemetry.sampling.consistent import ConsistentSampler, trace_of_run
from deployments.telemetry.sampling.retention import Keep, Retention
from deployments.telemetry.sampling.rule import KeepRule
from deployments.telemetry.spans import SpanFactory

Stage = TypeVar("Stage", bound=StageRecord)
Part = TypeVar("Part", bound=Interval)
_logger = logging.getLogger("slowlens.telemetry")


class Telemetry:
    """The telemetry of one replica.

    Args:
        service: which stage this process is.
        config: the application's configuration.
        model: the served model's name.
        identity: this process's identity in Ray.
        gpus: the devices assigned to this replica.
        models: the names of all served models, if there are several.
        max_records: records that wait for the telemetry thread; more are lost, and counted.
    """

    def __init__(
        self,
        service: Service,
        config: AppConfig,
        model: str,
        identity: ReplicaIdentity,
        gpus: Sequence[str] = (),
        max_records: int = MAX_RECORDS,
        models: Sequence[str] = (),
    ) -> None:
        self._config, self._model = config, model
        self._provider = Provider(service, config, identity)
        self._measures = Measures(
            self._provider.meter(),
            service,
            model,
            models,
            is_sampled_later=config.telemetry.sampling.mode == "tail",
        )
        self._sampler = ConsistentSampler(self._provider.sampler)
        self._ids = RandomIdGenerator()
        self._numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self.gpu = GpuReader(gpus, config.telemetry.gpu_sample_interval_s)
        self._run_delay, self._garbage = RunDelay(), GarbageWatch()
        self._used, self._used_by_all = Counter(time.process_time_ns, most=CPUS), Counter(busy(), most=CPUS)
        self._limit, self._steal = Counter(throttled()), Counter(stolen())
        self._pressure = {resource: Counter(pressure(resource)) for resource in ("cpu", "memory", "io")}
        self._garbage.watch()
        self._stalls = StallWatch(lambda: self._measures.count(metrics.LOOP_STALLS))
        show_process(self._measures)
        show_run_delay(self._measures, self._run_delay)
        show_shortages(self._measures, self._limit, self._steal, self._pressure)
        show_gpus(self._measures, self.gpu)
        sampling = config.telemetry.sampling
        rule = KeepRule(sampling.slowest_percent / 100, sampling.one_in) if service == "ingress" else None
        is_retroactive = sampling.mode == "retroactive" and self._provider.sink.wants_spans
        self._retention = Retention(sampling.hold_s, rule) if is_retroactive else None
        self._tell: Callable[[Sequence[Keep]], None] = lambda _: None
        self._unwritten = 0
        self._drain = Drain(self._export, max_records)

    def watch_thread(self) -> None:
        """Count how long the calling thread waits for a CPU: it works on requests."""
        self._run_delay.watch()

    def watch_loop(self) -> None:
        """Notice when the running event loop, on which requests are handled, stalls."""
        self._stalls.watch(asyncio.get_running_loop())

    @property
    def is_retroactive(self) -> bool:
        """Whether it is decided afterwards which traces are kept."""
        return self._retention is not None

    def keep(self, kept: Iterable[tuple[int, bool]]) -> None:
        """Keep these traces, as another process has told, and those that shared the runs of some."""
        if self._retention is not None:
            self._retention.ask(Keep(*each) for each in kept)

    def tell(self, others: Callable[[Sequence[Keep]], None]) -> None:
        """Call ``others`` on the running event loop with the traces that this process keeps."""
        loop = asyncio.get_running_loop()

        def told(kept: Sequence[Keep]) -> None:
            # The loop may have ended by now, and then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(others, kept)

        self._tell = told

    def close(self) -> None:
        """Hand everything recorded so far to the exporters and stop."""
        self._garbage.close()
        self._drain.close()
        self.gpu.close()
        self._provider.close()

    # --- one request, in the ingress ---

    @contextmanager
    def request(
        self,
        *,
        method: str,
        path: str,
        scheme: str,
        route: str,
        client: str,
        request_id: str,
        headers: Mapping[str, str],
        front_ns: int = 0,
        rpc_method: str = "",
        model: str = "",
        arrived_ns: int = 0,
    ) -> Iterator[RequestRecord]:
        """Record the root span. The block must set ``status``; the caller must turn an ApiError into a response.

        With ``front_ns``, the request began so long before it arrived, and was in what stands before the ingress.
        ``arrived_ns`` is when it arrived, if not now; ``model`` whose request it is, if not this telemetry's.
        """
        self.watch_thread()
        parent, arrived_ns = from_headers(headers), arrived_ns or time.monotonic_ns()
        context, model = self._root_context(parent), model or self._model
        record = RequestRecord(
            context=context,
            parent=parent,
            request_id=request_id,
            method=method,
            path=path,
            scheme=scheme,
            route=route,
            client=client,
            started_ns=arrived_ns - front_ns,
            rpc_method=rpc_method,
            model=model,
            # A caller that does not trace has decided that for itself.
            number=next(self._numbers[model]) if parent is None or context.trace_flags.sampled else None,
        )
        if front_ns:
            record.intervals.append(Interval("front", record.started_ns, arrived_ns))
        try:
            yield record
        finally:
            record.ended_ns = max(record.boundary_ns, record.streamed_until_ns)
            self._drain.put(record)

    def fail(self, record: RequestRecord, error: BaseException) -> ApiError:
        """Record why a request failed, and return the error to send to the client."""
        error = translate_cancellation(error)
        record.fault = Fault.of(error)
        trace_id = f"{record.context.trace_id:032x}"
        answer = error if isinstance(error, ApiError) else InternalError(f"internal error; trace id: {trace_id}")
        record.outcome, record.status = answer.outcome, answer.status
        in_stages = any(interval.fault is not None for interval in record.intervals if isinstance(interval, HopRecord))
        if answer.status < 500 and not in_stages:
            for fault in (record.fault, *(interval.fault for interval in record.intervals)):
                if fault is not None:
                    fault.is_callers = True
        return answer

    @contextmanager
    def interval(self, record: RequestRecord, name: str) -> Iterator[Interval]:
        """Record a part of the request that the ingress handles itself."""
        interval = Interval(name, record.boundary_ns)
        yield from self._in_interval(record, interval)

    @contextmanager
    def hop(self, record: RequestRecord, stage: Service, attempt: int = 1) -> Iterator[HopRecord]:
        """Record one actor call from the ingress to ``stage``."""
        hop = HopRecord(stage, record.boundary_ns, span_id=self._ids.generate_span_id(), attempt=attempt)
        yield from self._in_interval(record, hop)

    def _in_interval(self, record: RequestRecord, interval: Part) -> Iterator[Part]:
        try:
            yield interval
        except BaseException as error:
            interval.fault = Fault.of(translate_cancellation(error))
            raise
        finally:
            interval.ended_ns = time.monotonic_ns()
            record.intervals.append(interval)

    def carrier_of(self, record: RequestRecord, hop: HopRecord) -> Carrier:
        return to_carrier(record.context, hop.span_id)

    def _root_context(self, parent: SpanContext | None) -> SpanContext:
        trace_id = parent.trace_id if parent is not None else self._ids.generate_trace_id()
        ambient = set_span_in_context(NonRecordingSpan(parent), Context()) if parent is not None else Context()
        if self._retention is not None:
            # Everything is recorded; what is kept is decided when it has ended.
            state = parent.trace_state if parent is not None else None
            return SpanContext(trace_id, self._ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED), state)
        decision = self._sampler.should_sample(ambient, trace_id, names.PREDICT, SpanKind.SERVER, {}, ())
        flags = TraceFlags(
            TraceFlags.SAMPLED if decision.decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT
        )
        return SpanContext(trace_id, self._ids.generate_span_id(), False, flags, decision.trace_state)

    # --- one request, in a stage ---

    @contextmanager
    def stage(self, record: Stage) -> Iterator[Stage]:
        """Record the stage's own span. Failures are kept for ``record.reply``; cancellation propagates."""
        self.watch_thread()
        error: BaseException | None = None
        try:
            yield record
        except ApiError as failure:
            error = failure
        except Exception as failure:
            _logger.exception("a stage failed on request %s", record.envelope.request_id)
            error = failure
        except BaseException as failure:
            error = failure
            raise
        finally:
            record.end(error)
            self._drain.put(record)

    # --- one batch ---

    def batch_begins(self, batch: Batch[RunInput]) -> None:
        """Record, for each request with an input in this batch, that its inputs run from now on."""
        memberships: dict[PredictRecord, Membership] = {}
        for entry in batch.present:
            record = entry.payload.record
            if record not in memberships:
                memberships[record] = Membership(
                    self.context_in(record.carrier),
                    batch.started_ns,
                    entry.depth_on_arrival,
                    entry.busy_wait_ns,
                    entry.fill_wait_ns,
                )
                record.memberships.append(memberships[record])
            entry.payload.membership = memberships[record]

    def run_begins(
        self,
        batch: Batch[RunInput],
        entries: Sequence[BatchEntry[RunInput]],
        padded_tokens: int,
        started_ns: int,
    ) -> BatchRecord:
        """Start the record of one model run on these entries, linked to every request that has an input among them.

        ``run_ends`` must follow.
        """
        joined = dict.fromkeys(entry.payload.membership for entry in entries)
        members = [membership for membership in joined if membership is not None]
        record = BatchRecord(
            context=self.trace_of_run([member.context for member in members]),
            started_ns=started_ns,
            size=len(entries),
            tokens=sum(entry.tokens for entry in entries),
            padded_tokens=padded_tokens,
            reason=batch.reason,
            queue_behind=batch.queue_behind,
            waits_ns=[entry.wait_ns for entry in entries],
            members=members,
        )
        for member in members:
            member.runs.append(record)
        before = self.gpu.first()
        if before is not None:
            record.gpu_utilization = (before.utilization_percent, None)
            record.gpu_memory_free_gb = before.memory_free_gb
        return record

    def run_ends(self, record: BatchRecord, ended_ns: int, error: BaseException | None = None) -> None:
        record.ended_ns = ended_ns
        record.fault = Fault.of(error) if error is not None else None
        after = self.gpu.first()
        if after is not None:
            record.gpu_utilization = (record.gpu_utilization[0], after.utilization_percent)
        self._drain.put(record)

    def context_in(self, carrier: Carrier) -> SpanContext:
        """Return a context for a span of this request; if unsampled, a placeholder that is never exported."""
        if not is_sampled(carrier):
            return SpanContext(0, 0, False)
        return child_of(from_carrier(carrier), self._ids.generate_span_id())

    def trace_of_run(self, members: Sequence[SpanContext]) -> SpanContext:
        """Return a context for a span in a trace of its own, which samplers keep with the requests that it ran."""
        sampled = [member for member in members if member.trace_flags.sampled]
        trace_id, span_id = self._ids.generate_trace_id(), self._ids.generate_span_id()
        if not sampled:
            return SpanContext(trace_id, span_id, False)
        trace_id, state = trace_of_run(trace_id, sampled)
        return SpanContext(trace_id, span_id, False, TraceFlags(TraceFlags.SAMPLED), state)

    def put(self, record: object) -> None:
        """Hand over a record that is complete."""
        self._drain.put(record)

    # --- model load ---

    @contextmanager
    def model_load(self) -> Iterator[ModelLoadRecord]:
        context = self._root_context(None)
        record = ModelLoadRecord(context, time.monotonic_ns())
        try:
            yield record
        except BaseException as error:
            record.fault = Fault.of(error)
            raise
        finally:
            record.ended_ns = time.monotonic_ns()
            self._drain.put(record)

    @contextmanager
    def load_phase(self, record: ModelLoadRecord, name: str) -> Iterator[None]:
        # In the thread that will run the model: it is what requests wait for here, not the event loop.
        self._run_delay.watch(is_decisive=True)
        started_ns = time.monotonic_ns()
        try:
            yield
        finally:
            record.phases.append((name, started_ns, time.monotonic_ns()))

    # --- counters and gauges ---

    def count(self, spec: MetricSpec, amount: int = 1) -> None:
        self._measures.count(spec, amount)

    def gauge(self, spec: MetricSpec, reading: Reading) -> None:
        """Report the values of ``reading`` at every export; the model's name is added."""
        self._measures.gauge(spec, lambda: [(value, {"model": self._model, **more}) for value, more in reading()])

    # --- off the request path ---

    def flush(self) -> None:
        """Turn everything recorded so far into spans and measurements, in the calling thread."""
        self._drain.flush()

    def _export(self, records: Iterator[object], lost: int) -> None:
        self._run_delay.look()
        for counter in (self._used, self._used_by_all, self._limit, self._steal, *self._pressure.values()):
            counter.look()
        self._stalls.look()
        factory = SpanFactory(
            ids=self._ids,
            model=self._model,
            max_batch_size=self._config.batching.max_batch_size,
            max_wait_ms=self._config.batching.max_wait_ms,
            wall_offset_ns=time.time_ns() - time.monotonic_ns(),
            run_delay_ns=self._run_delay.between_ns,
            cpu_used={
                names.AI_CPU_USED_MS: self._used.between_ns,
                names.AI_CPU_HOST_USED_MS: self._used_by_all.between_ns,
            },
            shortages={
                names.AI_CPU_THROTTLED_MS: self._limit.between_ns,
                names.AI_CPU_STEAL_MS: self._steal.between_ns,
                names.AI_MEMORY_PRESSURE_MS: self._pressure["memory"].between_ns,
                names.AI_IO_PRESSURE_MS: self._pressure["io"].between_ns,
            },
            garbage_ns=self._garbage.between_ns,
            stalls_between=self._stalls.between,
        )
        for record in records:
            self._export_one(record, factory)
        if self._retention is not None:
            self._settle(self._retention, factory)
        self._provider.sink.tick()
        unwritten = self._provider.sink.unwritten
        if unwritten > self._unwritten:
            self._measures.count(metrics.UNWRITTEN_SPANS, unwritten - self._unwritten)
            self._unwritten = unwritten
        if lost:
            self._measures.count(metrics.DROPPED_RECORDS, lost)
        self._measures.flush()

    def _export_one(self, record: object, factory: SpanFactory) -> None:
        try:
            if self._retention is not None:
                for kept in self._retention.take(record):
                    self._write(kept, factory)
            elif self._provider.sink.wants_spans:
                self._write(record, factory)
            self._measures.measure(record)
        except Exception:
            _logger.exception("a %s could not be exported", type(record).__name__)
            self._drain.lose()

    def _write(self, record: object, factory: SpanFactory) -> None:
        for span in factory.spans(record):
            self._provider.sink.take(span)

    def _settle(self, retention: Retention, factory: SpanFactory) -> None:
        """Write what others keep, and tell them what this process keeps."""
        for record in retention.settle():
            self._write(record, factory)
        if told := retention.told():
            self._tell(told)
        if retention.let_go:
            self._measures.count(metrics.DROPPED_RECORDS, retention.let_go)
            retention.let_go = 0

"""Turns spans into requests, runs and loads: what ``slowlens why`` compares.

Incomplete requests are counted, and judged by the spans that are there. Runs and loads are converted to the clock of
the ingress.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from deployments.explain.counted import Counted
from deployments.explain.requests.device import Device
from deployments.explain.requests.request import (
    HINDRANCES,
    Request,
    lacks_a_stage,
    number,
    quickest_of,
    request_of,
    split,
    whole,
)
from deployments.explain.requests.scaling import Scaling
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import LOAD_PHASES, Key, Survey
from deployments.explain.traces.weights import weight_of_run
from deployments.telemetry import names, span_specs

_EXPORT_NS = 5 * 10**9
"""How long after its end a span may still be written."""
_OF_THE_INGRESS = {spec.name for spec in span_specs.SPANS if spec.service == "ingress"}
_VERSION = "service.version"
BINS = 60
"""Number of equal time bins in the window."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the model: a ``batch_forward`` span."""

    key: Key
    started_ns: int
    took_ns: int
    size: int
    tokens: int
    padded_tokens: int
    queue_behind: int
    reason: str
    failed: bool
    gpu_utilization: float | None
    """Percent, averaged over before and after the run; None without a GPU."""
    members: tuple[Key, ...]
    replica: str
    requests: int = 1
    """Those that had an input in it, traced or not."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One load of the model: a ``model_load`` span."""

    key: Key
    replica: str
    started_ns: int
    took_ns: int
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """By what was done."""
    hindered: Mapping[str, float] = field(default_factory=dict)
    """By attribute, for how many milliseconds."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps of a language model with the same members: an ``ai.engine.segment`` span."""

    started_ns: int
    ended_ns: int
    steps: int
    step_ms: float
    """Of all its steps."""
    prefill_tokens: int
    decode_tokens: int
    replica: str
    prompts_of: tuple[str, ...] = ()
    """Traces of the requests that were prefilled."""


Event = TypeVar("Event", Run, ModelLoad)


@dataclass(slots=True)
class Capture:
    survey: Survey
    requests: list[Request] = field(default_factory=list)
    """Those that were read in full, by start time."""
    spans: dict[Key, list[Span]] = field(default_factory=dict)
    """The spans of each request."""
    runs: dict[Key, Run] = field(default_factory=dict)
    """The runs that contain these requests."""
    segments: dict[Key, Segment] = field(default_factory=dict)
    """The segments that contain these requests."""
    loads: list[ModelLoad] = field(default_factory=list)
    """Within the window, by start time."""
    scalings: list[Scaling] = field(default_factory=list)
    """Decisions of the autoscaling policy, on its own clock."""
    devices: dict[str, Device] = field(default_factory=dict)
    """By model replica, with all its runs."""
    busy_ns: dict[str, list[int]] = field(default_factory=dict)
    """By model replica: how long its device ran batches in each bin of the window."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The configuration that the processes report (``slowlens.*``), by key: of those that served last."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By instance: its version and settings."""
    cut: int = 0
    """Windows of which the source had more than it returns at once."""
    late_s: float = 0.0
    """How long before it was read the newest request had ended, if traces reach the source by way of others."""
    counted: Counted | None = None
    """What metrics say of the window, if they were asked."""
    lost: int = 0
    """Spans and records that the processes report as lost."""
    incomplete: int = 0
    """Requests whose root, a parent of one of their spans, or the span of a stage is missing."""

    def weight(self, request: Request) -> float:
        """Return the number of requests that this one represents."""
        return self.survey.weights.get(request.key, 1.0)


def capture(spans: Iterable[Span], survey: Survey) -> Capture:
    """Collect the requests that the survey chose, and the runs and loads of its window."""
    found = Capture(survey)
    runs: dict[Key, Run] = {}
    devices: dict[str, Device] = defaultdict(Device)
    traces: dict[str, dict[str, Span]] = defaultdict(dict)
    loads: dict[Key, ModelLoad] = {}
    phases: dict[Key, dict[str, float]] = defaultdict(dict)
    orphans: dict[str, int] = {}
    seen: set[int] = set()
    for span in spans:
        if span.name == names.BATCH_FORWARD:
            if hash(span.key) not in seen:
                seen.add(hash(span.key))
                run = run_of(span)
                weight = weight_of_run(span.attributes, run.requests)
                devices[run.replica].add(
                    run.started_ns, run.took_ns, run.tokens, run.padded_tokens, run.requests, weight
                )
                # If the links of a run were lost, its requests are unknown.
                if not span.links or any(trace_id in survey.trace_ids_to_read for trace_id, _ in span.links):
                    runs[run.key] = run
        elif span.name == names.SEGMENT:
            if hash(span.key) not in seen:
                seen.add(hash(span.key))
                segment = segment_of(span)
                weight = weight_of_run(span.attributes, whole(span, names.AI_SEGMENT_REQUESTS))
                step_ns = round(segment.step_ms * 1e6)
                devices[segment.replica].add(segment.started_ns, step_ns, 0, 0, weight=weight)
                if not span.links or any(trace_id in survey.trace_ids_to_read for trace_id, _ in span.links):
                    found.segments[span.key] = segment
        elif span.name == names.MODEL_LOAD:
            took_ns, held_up = max(0, span.end_ns - span.start_ns), {key: number(span, key) for key in HINDRANCES}
            loads[span.key] = ModelLoad(span.key, span.instance, span.start_ns, took_ns, phases[span.key], held_up)
        elif span.name in LOAD_PHASES:
            took_ns = max(0, span.end_ns - span.start_ns)
            phases[span.trace_id, span.parent_id][LOAD_PHASES[span.name]] = took_ns / 1e6
        elif span.name == names.SCALING_DECISION:
            found.scalings.append(Scaling.of(span))
        elif span.trace_id in survey.trace_ids_to_read:
            traces[span.trace_id][span.span_id] = span
        elif span.trace_id not in survey.known:
            end_ns = span.end_ns if span.name in _OF_THE_INGRESS else 0
            orphans[span.trace_id] = max(end_ns, orphans.get(span.trace_id, 0))
    # What happened just before the end may not have been exported by all processes yet.
    complete_until_ns = max(survey.window_ns[1], *orphans.values(), 0) - _EXPORT_NS
    found.incomplete = sum(survey.since_ns <= end_ns <= complete_until_ns for end_ns in orphans.values())
    lost = 0.0
    for trace in traces.values():
        lost += _add_requests(trace, found, complete_until_ns)
    found.incomplete += round(lost)
    found.requests.sort(key=lambda request: request.started_ns)
    found.settings = _newest_settings(found)
    ahead = _clocks(found.requests)
    used = {key for request in found.requests for key in request.runs}
    found.runs = {key: _set_back(run, ahead) for key, run in runs.items() if key in used}
    found.loads = sorted((_set_back(load, ahead) for load in loads.values()), key=lambda load: load.started_ns)
    begin, end = survey.window_ns
    found.loads = [load for load in found.loads if load.started_ns <= end and load.started_ns + load.took_ns >= begin]
    for replica, device in devices.items():
        device.ahead_ns = ahead.get(replica, 0)
        found.devices[replica] = device
        found.busy_ns[replica] = device.busy_ns(survey.window_ns, BINS, bin_ns(survey.window_ns))
    return found


# --- requests --------------------------------------------------------------------------------------------------------


def _add_requests(trace: dict[str, Span], found: Capture, complete_until_ns: int) -> float:
    """Add the requests of a trace. Returns for how many requests spans are missing."""
    survey, lost = found.survey, 0.0
    has_gaps = any(s.parent_id not in trace for s in trace.values() if s.name != names.PREDICT)
    for spans in split(trace.values()):
        root = spans[0]
        if root.key not in survey.slow and root.key not in survey.ordinary and root.key not in survey.failed:
            continue
        request = request_of(spans)
        found.requests.append(request)
        found.spans[root.key] = spans
        for span in spans:
            if span.instance not in found.facts:
                found.facts[span.instance] = facts_of(span.resource)
        if (has_gaps or lacks_a_stage(request, spans)) and root.end_ns <= complete_until_ns:
            lost += found.weight(request)
    return lost


def facts_of(resource: Mapping[str, Any]) -> dict[str, Any]:
    """Return the version and the settings that a process reports."""
    settings = {key.removeprefix(names.SETTING): v for key, v in resource.items() if key.startswith(names.SETTING)}
    version = {_VERSION: resource[_VERSION]} if _VERSION in resource else {}
    return version | {key: value for key, value in settings.items() if isinstance(value, str | int | float)}


def _newest_settings(found: Capture) -> dict[str, Any]:
    last = {instance: number for number, one in enumerate(found.requests) for instance in one.replicas.values()}
    settings: dict[str, Any] = {}
    for instance in sorted(found.facts, key=lambda instance: last.get(instance, -1)):
        settings |= found.facts[instance]
    settings.pop(_VERSION, None)
    return settings


# --- runs and loads --------------------------------------------------------------------------------------------------


def run_of(span: Span) -> Run:
    """Read an ``ai.inference.batch_forward`` span."""
    seen = [span.attributes.get(f"ai.gpu.utilization_{when}") for when in ("pre", "post")]
    gpu = [float(percent) for percent in seen if isinstance(percent, int | float)]
    return Run(
        key=span.key,
        started_ns=span.start_ns,
        took_ns=max(0, span.end_ns - span.start_ns),
        size=whole(span, names.AI_BATCH_ACTUAL_SIZE),
        requests=whole(span, names.AI_BATCH_REQUESTS) or len({trace_id for trace_id, _ in span.links}),
        tokens=whole(span, names.AI_BATCH_TOKENS),
        padded_tokens=whole(span, names.AI_BATCH_PADDED_TOKENS),
        queue_behind=whole(span, names.AI_BATCH_QUEUE_BEHIND),
        reason=str(span.attributes.get(names.AI_BATCH_DISPATCH_REASON, "")),
        failed=span.failed,
        gpu_utilization=sum(gpu) / len(gpu) if gpu else None,
        members=span.links,
        replica=span.instance,
    )


def segment_of(span: Span) -> Segment:
    """Read an ``ai.engine.segment`` span, whose links begin with those that were prefilled."""
    prefilled = span.links[: max(0, whole(span, names.AI_SEGMENT_PREFILLING))]
    return Segment(
        started_ns=span.start_ns,
        ended_ns=span.end_ns,
        steps=max(1, whole(span, names.AI_SEGMENT_STEPS)),
        step_ms=max(0.0, number(span, names.AI_SEGMENT_STEP_MS)),
        prefill_tokens=max(0, whole(span, names.AI_SEGMENT_PREFILL_TOKENS)),
        decode_tokens=max(0, whole(span, names.AI_SEGMENT_DECODE_TOKENS)),
        replica=span.instance,
        prompts_of=tuple(dict.fromkeys(trace_id for trace_id, _ in prefilled)),
    )


def _set_back(event: Event, ahead: Mapping[str, int]) -> Event:
    """Return the event on the clock of the ingress."""
    return replace(event, started_ns=event.started_ns - ahead.get(event.replica, 0))


def _clocks(requests: Iterable[Request]) -> dict[str, int]:
    """How far the clock of each instance is ahead of its caller's, by the shortest latency in each direction."""
    best = quickest_of(call for request in requests for call in request.calls)
    return {call.between[1]: (call.there_ns - call.back_ns) // 2 for call in best.values()}


def bin_ns(window_ns: tuple[int, int]) -> int:
    """Return the length of one bin of the window."""
    return max(1, (window_ns[1] - window_ns[0]) // BINS + 1)

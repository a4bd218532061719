"""Spans to requests: what ``slowlens why`` compares.

A request is a trace with a span of the whole request in it. Traces of which only parts came are counted, not judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.explain.breakdown import Breakdown, break_down
from deployments.explain.otlp import Span
from deployments.telemetry import names

Key = tuple[str, str]
_EXPORT_NS = 5 * 10**9
"""How long after its end a span may be written."""
_OF_THE_INGRESS = {spec.name for spec in names.SPANS if spec.service == "ingress"}
_OF_A_REQUEST = {spec.name for spec in names.SPANS if spec.parent != "none"} - {
    names.LOAD_WEIGHTS,
    names.LOAD_DEVICE_MOVE,
    names.LOAD_WARM_UP,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the model: a ``batch_forward`` span."""

    key: Key
    took_ns: int
    size: int
    tokens: int
    padded_tokens: int
    queue_behind: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Call:
    """The way to a stage and back, on two clocks whose difference is not known."""

    stage: str
    between: tuple[str, str]
    """The instances of caller and stage."""
    there_ns: int
    """From the caller's start to the stage's, by their own clocks."""
    back_ns: int


@dataclass(frozen=True, slots=True)
class Request:
    trace_id: str
    started_ns: int
    breakdown: Breakdown
    route: str
    error: str
    """``error.type``; empty where there was none."""
    tokens: int
    chars: int
    truncated: bool
    model_replica: str
    runs: tuple[Key, ...]
    """Links of its forward passes; more than it has forward passes where a run was repeated."""
    passes: int
    calls: tuple[Call, ...]
    max_wait_ms: float
    """``batching.max_wait_ms`` as its spans state it."""

    @property
    def latency_ns(self) -> int:
        return self.breakdown.latency_ns


@dataclass(slots=True)
class Capture:
    requests: list[Request]
    runs: dict[Key, Run]
    incomplete: int
    """Requests that miss their root or a parent of one of their spans."""


def capture(spans: Iterable[Span], since_ns: int = 0) -> Capture:
    """All requests that ended at ``since_ns`` or later, by the clock of their ingress."""
    traces: dict[str, dict[str, Span]] = defaultdict(dict)
    runs: dict[Key, Run] = {}
    for span in spans:
        if span.name == names.BATCH_FORWARD:
            runs[span.key] = _run(span)
        elif span.name in _OF_A_REQUEST:
            traces[span.trace_id][span.span_id] = span
    ends = {trace_id: _end_ns(trace.values()) for trace_id, trace in traces.items()}
    # What happened just before the end may not have been exported by all processes yet.
    complete_until_ns = max(ends.values(), default=0) - _EXPORT_NS
    requests = []
    incomplete = 0
    for trace_id, trace in traces.items():
        if ends[trace_id] < since_ns:
            continue
        request = _request(list(trace.values()))
        if request is not None:
            requests.append(request)
        if request is None or _has_gaps(trace):
            incomplete += ends[trace_id] <= complete_until_ns
    requests.sort(key=lambda request: request.started_ns)
    used = {key for request in requests for key in request.runs}
    return Capture(requests, {key: run for key, run in runs.items() if key in used}, incomplete)


def _end_ns(trace: Iterable[Span]) -> int:
    """Of a request, by the ingress; 0 where no span of the ingress came."""
    return max((span.end_ns for span in trace if span.name in _OF_THE_INGRESS), default=0)


def window_of(requests: Sequence[Request]) -> tuple[int, int]:
    """From the first request's start to the last one's end, in Unix nanoseconds; zeros of none."""
    if not requests:
        return 0, 0
    return min(r.started_ns for r in requests), max(r.started_ns + r.latency_ns for r in requests)


def _has_gaps(trace: dict[str, Span]) -> bool:
    return any(span.parent_id not in trace for span in trace.values() if span.name != names.PREDICT)


def _run(span: Span) -> Run:
    return Run(
        span.key,
        max(0, span.end_ns - span.start_ns),
        _int(span, "ai.batch.actual_size"),
        _int(span, "ai.batch.tokens"),
        _int(span, "ai.batch.padded_tokens"),
        _int(span, "ai.batch.queue_behind"),
        span.failed,
    )


def _request(trace: Sequence[Span]) -> Request | None:
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in trace:
        by_name[span.name].append(span)
    if not by_name[names.PREDICT]:
        return None
    root = by_name[names.PREDICT][0]
    predicted = next(iter(by_name[names.BATCHED_PREDICT]), None)
    passes = by_name[names.FORWARD_PASS]
    return Request(
        trace_id=root.trace_id,
        started_ns=root.start_ns,
        breakdown=break_down(trace),
        route=str(root.attributes.get("http.route", "")),
        error=str(root.attributes.get("error.type") or ("error" if root.failed else "")),
        tokens=_int(root, "gen_ai.usage.input_tokens"),
        chars=_int(root, "ai.input_length"),
        truncated=any(span.attributes.get("ai.preprocess.was_truncated") is True for span in trace),
        model_replica=predicted.instance if predicted is not None else "",
        runs=tuple(link for span in passes for link in span.links),
        passes=len(passes),
        calls=tuple(_calls(by_name)),
        max_wait_ms=_number(predicted, "ai.batch.timeout_ms") if predicted is not None else 0.0,
    )


def _calls(by_name: dict[str, list[Span]]) -> Iterable[Call]:
    for stage, hop_name, stage_name in (
        ("tokenizer", names.HOP_TOKENIZER, names.PREPROCESS),
        ("model", names.HOP_MODEL, names.BATCHED_PREDICT),
        ("postprocessor", names.HOP_POSTPROCESSOR, names.POSTPROCESS),
    ):
        for hop in by_name.get(hop_name, ()):
            for served in by_name.get(stage_name, ()):
                if served.parent_id == hop.span_id:
                    between = (hop.instance, served.instance)
                    yield Call(stage, between, served.start_ns - hop.start_ns, hop.end_ns - served.end_ns)


def _int(span: Span, key: str) -> int:
    return int(_number(span, key))


def _number(span: Span, key: str) -> float:
    """Of an attribute; 0 where it is missing or no number."""
    value = span.attributes.get(key, 0)
    return value if isinstance(value, int | float) and abs(value) < 2**62 else 0

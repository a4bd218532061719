"""Splits a trace into its requests: what is known about each.

A trace may have several requests (its caller called more than once): each is a root span with its descendants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.explain.requests.breakdown import Breakdown, break_down, is_lost, union, wait_ns, without
from deployments.explain.requests.device import Interval
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Key, Root, route_of
from deployments.telemetry import names

_STAGES = (
    ("tokenizer", names.HOP_TOKENIZER, names.PREPROCESS),
    ("model", names.HOP_MODEL, names.BATCHED_PREDICT),
    ("postprocessor", names.HOP_POSTPROCESSOR, names.POSTPROCESS),
)
_STARVED = (
    ("ingress", names.PREDICT),
    ("tokenizer", names.PREPROCESS),
    ("model", names.BATCHED_PREDICT),
    ("postprocessor", names.POSTPROCESS),
)
HINDRANCES = {
    names.AI_CPU_THROTTLED_MS: "a CPU limit of its container held the {} back",
    names.AI_CPU_STEAL_MS: "the hypervisor ran others on the CPUs of the {} (steal)",
    names.AI_MEMORY_PRESSURE_MS: "the container of the {} was short of memory (pressure)",
    names.AI_IO_PRESSURE_MS: "threads in the container of the {} waited for the disk (pressure)",
    names.AI_EVENT_LOOP_STALL_MS: "the event loop of the {} stalled (its stack is in the traces)",
    names.AI_GC_PAUSE_MS: "garbage was collected in the {}",
}
"""What may hold a process up, by attribute: what is said of the stage where it did."""
STAGE_OF = {hop: stage for _, hop, stage in _STAGES}
"""Maps the span name of a call to the span name of the stage that it calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """Latency to a stage and back, on two clocks whose offset is unknown."""

    stage: str
    between: tuple[str, str]
    """The instances of caller and stage."""
    there_ns: int
    """From the caller's start to the stage's, each on its own clock."""
    back_ns: int
    waited_ns: int = 0
    """In the caller, before that: for a replica that could take it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation: its first choice until that has a token, then the choice that ends last."""

    prefill_tokens: int
    chunks: int
    tokens: int
    first_token_ms: float
    """From the arrival of its request until its first tokens had reached the ingress; 0 if there were none."""
    prefill: tuple[Key, ...]
    """The segments that it was prefilled in."""
    decode: tuple[Key, ...]
    """The costliest segments that it decoded in."""


@dataclass(frozen=True, slots=True)
class Request:
    key: Key
    started_ns: int
    breakdown: Breakdown
    route: str
    error: str
    """``error.type``; empty if there was none."""
    request_id: str
    client: str
    """``client.address``; empty if unknown."""
    tenant: str
    """``ai.tenant``; empty if there are no API keys."""
    inputs: int
    tokens: int
    chars: int
    truncated: bool
    replicas: Mapping[str, str]
    """By stage, the replica that handled it."""
    host: str
    """Where its model replica ran."""
    runs: tuple[Key, ...]
    """Links of its forward passes; more than there are forward passes if a run was repeated."""
    starved_ms: Mapping[str, float]
    """By stage, how long threads of its process could run and did not meanwhile."""
    cpus: tuple[tuple[str, str, float, float], ...]
    """Of each stage whose threads could run and did not: its instance, the host, and how many CPUs its process, and all
    processes of the host, used meanwhile."""
    hindered: Mapping[str, tuple[str, float]]
    """By attribute, what hindered it: the stage where that took longest, and milliseconds there."""
    waits: tuple[Interval, ...]
    """When it waited in the model replica, on that replica's clock."""
    calls: tuple[Call, ...]
    max_wait_ms: float
    """``batching.max_wait_ms`` as reported in its spans."""
    generation: Generation | None = None
    """Of a language model's requests."""

    @property
    def trace_id(self) -> str:
        return self.key[0]

    @property
    def latency_ns(self) -> int:
        return self.breakdown.latency_ns

    @property
    def is_cold(self) -> bool:
        return self.breakdown.cold_start > 0


def split(trace: Iterable[Span]) -> list[list[Span]]:
    """Return the requests of a trace, by start time: each as its root, followed by its descendants."""
    below: dict[str, list[Span]] = defaultdict(list)
    spans = list({span.span_id: span for span in trace}.values())
    for span in spans:
        below[span.parent_id].append(span)
    found = []
    for root in sorted((s for s in spans if s.name == names.PREDICT), key=lambda s: s.start_ns):
        request = [root]
        for span in request:
            request += (s for s in below[span.span_id] if s.name != names.PREDICT)
        found.append(request)
    return found


def request_of(spans: Sequence[Span]) -> Request:
    """Build a request from its spans, root first."""
    root = spans[0]
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span)
    generated = min(by_name[names.GENERATE], key=lambda s: s.start_ns, default=None)
    predicted = next(iter(by_name[names.BATCHED_PREDICT]), generated)
    return Request(
        key=root.key,
        started_ns=root.start_ns,
        breakdown=break_down(spans),
        route=route_of(root.attributes),
        error=Root.of(root).error,
        request_id=str(root.attributes.get(names.AI_REQUEST_ID, "")),
        client=str(root.attributes.get(names.CLIENT_ADDRESS, "")),
        tenant=str(root.attributes.get(names.AI_TENANT, "")),
        inputs=whole(root, names.AI_INPUT_COUNT),
        tokens=whole(root, names.GEN_AI_USAGE_INPUT_TOKENS),
        chars=whole(root, names.AI_INPUT_LENGTH),
        truncated=any(span.attributes.get(names.AI_PREPROCESS_WAS_TRUNCATED) is True for span in spans),
        replicas={
            "ingress": root.instance,
            **{stage: span.instance for stage, _, name in _STAGES for span in by_name[name]},
            **({"model": generated.instance} if generated is not None else {}),
        },
        host=_host(predicted.resource) if predicted is not None else "",
        runs=tuple(link for span in by_name[names.FORWARD_PASS] for link in span.links),
        starved_ms=_in_stages(by_name, predicted, names.AI_CPU_RUN_DELAY_MS),
        cpus=tuple(_cpus(by_name, predicted)),
        hindered={
            key: max(found.items(), key=lambda pair: pair[1])
            for key in HINDRANCES
            if (found := _in_stages(by_name, predicted, key))
        },
        waits=tuple(without(_intervals(by_name[names.QUEUE]), _intervals(by_name[names.FORWARD_PASS]))),
        calls=tuple(_calls(by_name)),
        max_wait_ms=number(predicted, names.AI_BATCH_TIMEOUT_MS) if predicted is not None else 0.0,
        generation=_generation(root, generated, by_name) if generated is not None else None,
    )


def _in_stages(by_name: Mapping[str, Sequence[Span]], predicted: Span | None, key: str) -> dict[str, float]:
    """A time by stage, where there was any. Of several choices of a generation, which overlap, the first counts."""
    spans = {stage: by_name.get(name, ()) for stage, name in _STARVED}
    spans["model"] = spans["model"] or ([predicted] if predicted is not None else [])
    found = {stage: sum(number(one, key) for one in ones) for stage, ones in spans.items()}
    return {stage: ms for stage, ms in found.items() if ms > 0}


def _cpus(by_name: Mapping[str, Sequence[Span]], predicted: Span | None) -> Iterable[tuple[str, str, float, float]]:
    generated = [predicted] if predicted is not None and predicted.name == names.GENERATE else []
    for span in (*(span for _, name in _STARVED for span in by_name.get(name, ())), *generated):
        if span.ms > 0 and (of_host := number(span, names.AI_CPU_HOST_USED_MS)) > 0:
            yield span.instance, _host(span.resource), number(span, names.AI_CPU_USED_MS) / span.ms, of_host / span.ms


def _generation(root: Span, first: Span, by_name: Mapping[str, Sequence[Span]]) -> Generation:
    def of(choice: Span, name: str) -> Span | None:
        return next((span for span in by_name.get(name, ()) if span.parent_id == choice.span_id), None)

    last = max(by_name[names.GENERATE], key=lambda span: span.end_ns)
    prefill, decode = of(first, names.PREFILL), of(last, names.DECODE)
    return Generation(
        prefill_tokens=whole(prefill, names.AI_PREFILL_TOKENS) if prefill is not None else 0,
        chunks=whole(prefill, names.AI_PREFILL_CHUNKS) if prefill is not None else 0,
        tokens=whole(decode, names.AI_DECODE_TOKENS) if decode is not None else 0,
        first_token_ms=max(0.0, number(root, names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK) * 1e3),
        prefill=prefill.links if prefill is not None else (),
        decode=decode.links if decode is not None else (),
    )


def lacks_a_stage(request: Request, spans: Sequence[Span]) -> bool:
    """Whether a request succeeded although the span of a stage that it called is missing."""
    present = {(span.parent_id, span.name) for span in spans}
    present |= {(parent, names.BATCHED_PREDICT) for parent, name in present if name == names.GENERATE}
    return not request.error and any(
        (span.span_id, STAGE_OF[span.name]) not in present
        for span in spans
        if span.name in STAGE_OF and not is_lost(span)
    )


def _intervals(spans: Iterable[Span]) -> list[Interval]:
    return union((span.start_ns, span.end_ns) for span in spans)


def _calls(by_name: Mapping[str, Sequence[Span]]) -> Iterable[Call]:
    for stage, hop_name, stage_name in _STAGES:
        for hop in by_name.get(hop_name, ()):
            for served in by_name.get(stage_name, ()) or by_name.get(names.GENERATE, ()):
                if served.parent_id == hop.span_id:
                    between = (hop.instance, served.instance)
                    waited_ns = wait_ns(hop)
                    there_ns = served.start_ns - hop.start_ns - waited_ns
                    yield Call(stage, between, there_ns, hop.end_ns - served.end_ns, waited_ns)


def quickest_of(calls: Iterable[Call]) -> dict[tuple[str, str, str], Call]:
    """By stage and pair of instances: the shortest latency there and back, possibly from different calls."""
    quickest: dict[tuple[str, str, str], Call] = {}
    for call in calls:
        key = (call.stage, *call.between)
        seen = quickest.get(key, call)
        quickest[key] = Call(
            call.stage, call.between, min(seen.there_ns, call.there_ns), min(seen.back_ns, call.back_ns)
        )
    return quickest


def _host(resource: Mapping[str, Any]) -> str:
    keys = ("k8s.node.name", "host.name", "ray.node.id")
    return next((str(resource[key]) for key in keys if resource.get(key)), "")


def window_of(requests: Sequence[Request]) -> tuple[int, int]:
    """From the first request's start to the last one's end, in Unix nanoseconds; zeros if there are none."""
    if not requests:
        return 0, 0
    return min(r.started_ns for r in requests), max(r.started_ns + r.latency_ns for r in requests)


def whole(span: Span, key: str) -> int:
    return int(number(span, key))


def number(span: Span, key: str) -> float:
    """Return the value of an attribute; 0 if it is missing or not a number."""
    value = span.attributes.get(key, 0)
    return value if isinstance(value, int | float) and abs(value) < 2**62 else 0

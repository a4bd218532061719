"""Synthetic requests, span by span: a 10-token request that waits for nothing, and possible deviations from it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from deployments.explain.traces.otlp import Span
from deployments.telemetry import names

SKEW = {
    "ingress": 0.0,
    "tokenizer": 7_000_000.0,
    "model": -3_000_000.0,
    "postprocessor": 12.5,
    "autoscaler": 0.0,
    "model-2": 0.0,
}
"""Milliseconds by which each host's clock is ahead."""
RUN_MS, TOKEN_MS = 4.0, 0.5


def span(
    trace: str,
    ident: str,
    parent: str,
    name: str,
    where: str,
    start: float,
    took: float,
    links: Sequence[tuple[str, str]] = (),
    **attributes: Any,
) -> Span:
    start_ns = 10**18 + round((start + SKEW[where]) * 1e6)
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    return Span(
        trace, ident, parent, name, f"slowlens.{where}", where, start_ns, start_ns + round(took * 1e6), named,
        tuple(links), "error.type" in named,
    )  # fmt: skip


def request(number: int, at_ms: float, **slow: Any) -> Iterator[Span]:
    """A 10-token request, alone in its run, that waits for nothing, except as ``slow`` overrides."""
    d: dict[str, Any] = {
        "upload": 1.0,
        "tokenize": 0.5,
        "there": 1.0,
        "back": 1.0,
        "busy": 0.0,
        "fill": 0.0,
        "contention": 0.0,
    }
    # Before the call to the model: a wait for a replica that is stated, and an attempt on a replica that died.
    d |= {"waited": 0.0, "attempt": 0.0}
    # Of the contention, and of the way to the model: what threads waited for a CPU.
    d |= {"starved": 0.0, "ingress_starved": 0.0}
    d |= {"postprocess": 0.4, "tokens": 10, "batch_mates": 0, "padding": 0, "cold": 0.0, "lost": (), "error": ""}
    d |= {
        "chars": 40,
        "client": "10.0.0.1",
        "replica": "model",
        "host": "one",
        "route": "/v1/embeddings",
        "id": f"id-{number}",
    }
    d |= slow
    trace, run = f"{number:032x}", f"{number + 10**6:032x}"
    forward = RUN_MS + TOKEN_MS * (d["tokens"] + d["batch_mates"] + d["padding"]) + d["contention"]
    wait = d["busy"] + d["fill"]
    clock = at_ms
    made = []

    def hop(ident: str, name: str, stage: str, held: float, there: float, **attributes: Any) -> float:
        nonlocal clock
        took = there + held + d["back"]
        made.append(span(trace, ident, "root", name, "ingress", clock, took))
        made.append(span(trace, ident + "s", ident, stage_names[stage], stage, clock + there, held, **attributes))
        clock += took
        return float(clock - d["back"] - held)

    stage_names = {"tokenizer": names.PREPROCESS, "model": names.BATCHED_PREDICT, "postprocessor": names.POSTPROCESS}
    made.append(span(trace, "v", "root", names.VALIDATE, "ingress", clock, d["upload"]))
    clock += d["upload"]
    hop("ht", names.HOP_TOKENIZER, "tokenizer", d["tokenize"], d["there"])
    if d["attempt"]:
        made.append(
            span(trace, "h1", "root", names.HOP_MODEL, "ingress", clock, d["attempt"], error__type="replica_died")
        )
        clock += d["attempt"]
    began = hop(
        "hm", names.HOP_MODEL, "model", wait + forward, d["there"] + d["cold"] + d["waited"],
        ai__model__load_type="cold" if d["cold"] else "warm", ai__batch__timeout_ms=200.0,
        ai__batch__wait_time_ms=wait,
        **({"ai__cpu__run_delay_ms": d["starved"]} if d["starved"] else {}),
    )  # fmt: skip
    if d["waited"]:
        hop_span = made[-2]
        made[-2] = replace(hop_span, attributes=hop_span.attributes | {"ai.hop.wait_ms": d["waited"]})
    waits = {"ai__queue__device_busy_ms": d["busy"], "ai__queue__fill_wait_ms": d["fill"]}
    made.append(span(trace, "q", "hms", names.QUEUE, "model", began, wait, **waits))
    made.append(span(trace, "f", "hms", names.FORWARD_PASS, "model", began + wait, forward, [(run, "b")]))
    hop("hp", names.HOP_POSTPROCESSOR, "postprocessor", d["postprocess"], d["there"])
    made.append(span(trace, "r", "root", names.RESPOND, "ingress", clock, 0.1))
    clock += 0.1
    failed = {"error__type": d["error"]} if d["error"] else {}
    root = {"http__route": d["route"], "gen_ai__usage__input_tokens": d["tokens"], "ai__input_length": d["chars"]}
    root |= {"client__address": d["client"], "ai__request_id": d["id"]}
    root |= {"ai__cpu__run_delay_ms": d["ingress_starved"]} if d["ingress_starved"] else {}
    made.append(span(trace, "root", "", names.PREDICT, "ingress", at_ms, clock - at_ms, **root, **failed))
    tokens = d["tokens"] + d["batch_mates"]
    made.append(
        span(
            run, "b", "", names.BATCH_FORWARD, "model", began + wait, forward, [(trace, "f")], ai__batch__actual_size=1,
            ai__batch__tokens=tokens, ai__batch__padded_tokens=tokens + d["padding"],
        )
    )  # fmt: skip
    for one in made:
        if one.service == "slowlens.model":
            resource = {"host.name": d["host"], "slowlens.batching.max_batch_tokens": 8192}
            one = replace(one, instance=d["replica"], resource=resource)
        if one.span_id not in d["lost"]:
            yield one


def window(slow: dict[str, Any], every: int = 12, count: int = 240) -> list[Span]:
    """A busy minute in which one of ``every`` requests is slow in this way. Inputs have 5 to 15 tokens."""
    chance = random.Random(7)
    spans: list[Span] = []
    for number in range(count):
        usual = {"tokens": chance.randint(5, 15), "busy": chance.random() * 2, "there": 1 + chance.random()}
        spans += request(number, number * 250.0, **usual | (slow if number % every == min(3, every - 1) else {}))
    chance.shuffle(spans)
    return spans


CASES: dict[str, dict[str, Any]] = {
    "cold_start": {"cold": 900.0},
    "replica_queue": {"there": 60.0},
    "errors_retries": {"attempt": 80.0},
    "device_queue": {"busy": 80.0, "batch_mates": 40},
    "batch_fill": {"fill": 200.0},
    "tokenization": {"tokenize": 90.0},
    "long_input": {"tokens": 250},
    "padding": {"padding": 300},
    "device_contention": {"contention": 70.0},
    "cpu_starvation": {"contention": 40.0, "starved": 38.0, "there": 20.0, "back": 20.0, "ingress_starved": 110.0},
    "postprocessing": {"postprocess": 60.0},
    "transit": {"there": 30.0, "back": 30.0},
    "slow_upload": {"upload": 500.0},
}


def moved(spans: Iterable[Span], by_ns: int) -> list[Span]:
    """The same spans, ``by_ns`` later."""
    return [replace(one, start_ns=one.start_ns + by_ns, end_ns=one.end_ns + by_ns) for one in spans]


def otlp(spans: Iterable[Span]) -> str:
    """Lines of OTLP JSON, one for each span."""
    return "\n".join(json.dumps(otlp_of(one)) for one in spans)


def otlp_of(one: Span) -> dict[str, Any]:
    """A ``TracesData`` object."""
    made: dict[str, Any] = {
        "traceId": one.trace_id,
        "spanId": ident_of(one.span_id),
        "parentSpanId": ident_of(one.parent_id),
        "name": one.name,
        "startTimeUnixNano": str(one.start_ns),
        "endTimeUnixNano": str(one.end_ns),
        "attributes": [{"key": key, "value": _value(content)} for key, content in one.attributes.items()],
        "links": [{"traceId": trace, "spanId": ident_of(name)} for trace, name in one.links],
        "status": {"code": 2} if one.failed else {},
    }
    if state := one.attributes.get(names.W3C_TRACESTATE):
        made["traceState"] = state
        made["attributes"] = [pair for pair in made["attributes"] if pair["key"] != names.W3C_TRACESTATE]
    own = {"service.name": one.service, "service.instance.id": one.instance, **one.resource}
    resource = [{"key": key, "value": _value(content)} for key, content in own.items()]
    return {"resourceSpans": [{"resource": {"attributes": resource}, "scopeSpans": [{"spans": [made]}]}]}


def _value(content: Any) -> dict[str, Any]:
    kinds: dict[type, Callable[[Any], dict[str, Any]]] = {
        bool: lambda v: {"boolValue": v},
        int: lambda v: {"intValue": str(v)},
        float: lambda v: {"doubleValue": v},
    }
    return kinds.get(type(content), lambda v: {"stringValue": v})(content)


def ident_of(name: str) -> str:
    return name.encode().hex().ljust(16, "0") if name else ""

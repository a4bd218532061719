"""The ``Server-Timing`` header: the same numbers as the spans, for clients that have only the response."""

from __future__ import annotations

import time
from collections.abc import Mapping

from deployments.telemetry.records import HopRecord, RequestRecord


def server_timing(record: RequestRecord) -> str:
    """Milliseconds by stage; they add up to ``total``, except for the microseconds that framing the response takes.

    ``queue`` and ``forward`` are the model replica's time, ``transit`` the cost of the hops beyond the stages' own
    time, lost attempts included, and what came before the ingress, if that is known. For a request that failed in the
    model replica, its time there is reported under ``queue``.
    """
    hops = record.hops
    held = {name: hop.held_ns for name, hop in hops.items()}
    validate = next((i for i in record.intervals if i.name == "validate"), None)
    parts = {
        "validate": validate.ended_ns - validate.started_ns if validate else 0,
        "tokenize": held.get("tokenizer", 0),
        "queue": held.get("model", 0) - record.forward_ns,
        "forward": record.forward_ns,
        "postprocess": held.get("postprocessor", 0),
        "transit": _front_ns(record) + sum(one.transit_ns for one in record.intervals if isinstance(one, HopRecord)),
        "total": record.boundary_ns - record.started_ns,
    }
    return _header(parts)


def generation_timing(record: RequestRecord, *, is_over: bool) -> str:
    """Milliseconds of a generation by stage: what is known at its first token, and the rest if it is over.

    ``transit`` is the cost of the hops up to the first token. ``decode`` is all that follows it. For a request that
    failed before it, the time in the model replica is reported under ``queue``.
    """
    facts, now_ns = record.generation, time.monotonic_ns()
    validate = next((i for i in record.intervals if i.name == "validate"), None)
    tokenizer, model = record.hops.get("tokenizer"), record.hops.get("model")
    has_token = facts is not None and facts.first_token_ns > 0
    first_ns = facts.first_token_ns if facts is not None and has_token else now_ns
    queue_ns = facts.queue_ns if facts is not None and has_token else model.held_ns if model is not None else 0
    prefill_ns = facts.prefill_ns if facts is not None else 0
    to_token_ns = first_ns - facts.model_sent_ns if facts is not None and facts.model_sent_ns else 0
    parts = {
        "validate": validate.ended_ns - validate.started_ns if validate else 0,
        "tokenize": tokenizer.held_ns if tokenizer else 0,
        "queue": queue_ns,
        "prefill": prefill_ns,
        "transit": _front_ns(record)
        + (tokenizer.transit_ns if tokenizer else 0)
        + max(0, to_token_ns - queue_ns - prefill_ns),
    }
    if is_over:
        parts |= {"decode": now_ns - first_ns, "total": now_ns - record.started_ns}
    return _header(parts)


def _front_ns(record: RequestRecord) -> int:
    return sum(one.ended_ns - one.started_ns for one in record.intervals if one.name == "front")


def _header(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name};dur={nanoseconds / 1e6:.3f}" for name, nanoseconds in parts.items())

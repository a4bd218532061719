"""The ``Server-Timing`` header: the same numbers as the spans, for clients that have only the response."""

from __future__ import annotations

from deployments.telemetry.records import RequestRecord


def server_timing(record: RequestRecord) -> str:
    """Milliseconds by stage; they add up to ``total``, except for the microseconds that framing the response takes.

    ``queue`` and ``forward`` are the model replica's time, ``transit`` the cost of the hops beyond the stages' own
    time. For a request that failed in the model replica, its time there is reported under ``queue``.
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
        "transit": sum(hop.transit_ns for hop in hops.values()),
        "total": record.boundary_ns - record.started_ns,
    }
    return ", ".join(f"{name};dur={nanoseconds / 1e6:.3f}" for name, nanoseconds in parts.items())

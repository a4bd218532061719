"""One request as a waterfall, with the batch that ran it beneath."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deployments.explain.breakdown import Breakdown
from deployments.explain.otlp import Span
from deployments.telemetry import names

_WIDTH = 40
# What a reader looks for first, by span: shown behind its bar.
_SHOWN = (
    "ai.hop.transit_ms",
    "ai.preprocess.token_count",
    "ai.preprocess.was_truncated",
    "ai.model.load_type",
    "ai.queue.device_busy_ms",
    "ai.queue.fill_wait_ms",
    "ai.batch.actual_size",
    "ai.batch.padding_ratio",
    "ai.batch.dispatch_reason",
    "http.response.status_code",
    "error.type",
)


def waterfall(trace: Sequence[Span], linked: Sequence[Span]) -> Iterator[str]:
    """Lines of text: the spans of a trace, and those of others that it links to.

    Spans whose parent is missing stand at the top level, so nothing is hidden.
    """
    start = min(span.start_ns for span in trace)
    scale = max(span.end_ns for span in trace) - start
    yield f"trace {trace[0].trace_id}"
    present = {span.span_id for span in trace}
    for root in _by_start(span for span in trace if span.parent_id not in present):
        yield from _branch(root, trace, start, scale, 0)
    for batch in _by_start(linked):
        members = _members(batch) if batch.name == names.BATCH_FORWARD else "waited for"
        yield f"linked: {members}, trace {batch.trace_id}"
        yield _line(batch, start, scale, 0)


def spent(breakdown: Breakdown) -> Iterator[str]:
    """Lines of text: what the latency was made of, in the order of the way of a request."""
    latency = breakdown.latency_ns
    yield f"{latency / 1e6:.2f} ms were spent on"
    for part, took in breakdown.parts():
        if took:
            share = took / latency
            bar = "#" * round(share * _WIDTH)
            yield f"  {part.replace('_', ' '):<22} {took / 1e6:22.2f} ms |{bar:<{_WIDTH}}| {share:.1%}"


def _members(batch: Span) -> str:
    count = len(batch.links)
    return f"{count} request{'' if count == 1 else 's'} in it"


def _branch(span: Span, trace: Sequence[Span], start: int, scale: int, depth: int) -> Iterator[str]:
    yield _line(span, start, scale, depth)
    for child in _by_start(other for other in trace if other.parent_id == span.span_id):
        yield from _branch(child, trace, start, scale, depth + 1)


def _line(span: Span, start: int, scale: int, depth: int) -> str:
    label = "  " * depth + span.name.removeprefix("ai.inference.").removeprefix("ai.")
    first = min(_WIDTH - 1, max(0, (span.start_ns - start) * _WIDTH // max(scale, 1)))
    last = min(_WIDTH, max(first + 1, -(-(span.end_ns - start) * _WIDTH // max(scale, 1))))
    bar = " " * first + ("x" if span.failed else "=") * (last - first)
    shown = ", ".join(
        f"{key.rpartition('.')[2]} {_short(span.attributes[key])}" for key in _SHOWN if key in span.attributes
    )
    service = span.service.removeprefix("slowlens.")
    return f"{label:<24} {service:<13} {span.ms:9.2f} ms |{bar:<{_WIDTH}}| {shown}".rstrip()


def _short(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _by_start(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))

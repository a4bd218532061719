"""One request as a waterfall, with the batch that ran it beneath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deployments.explain.source import Span
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


def find_trace(spans: Sequence[Span], trace_id: str | None) -> list[Span]:
    """The spans of that request, or of the newest one. Raises LookupError where there is none."""
    if trace_id is None:
        roots = [span for span in spans if span.name == names.PREDICT]
        if not roots:
            raise LookupError("there is no request in these traces yet")
        trace_id = max(roots, key=lambda span: span.end_ns).trace_id
    found = [span for span in spans if span.trace_id == trace_id]
    if not found:
        raise LookupError(f"no span of trace {trace_id} is here")
    return found


def waterfall(trace: Sequence[Span], spans: Sequence[Span]) -> Iterator[str]:
    """Lines of text. Spans whose parent is missing stand at the top level, so nothing is hidden."""
    start = min(span.start_ns for span in trace)
    scale = max(span.end_ns for span in trace) - start
    yield f"trace {trace[0].trace_id}"
    present = {span.span_id for span in trace}
    for root in _by_start(span for span in trace if span.parent_id not in present):
        yield from _branch(root, trace, start, scale, 0)
    links = {link for span in trace for link in span.links}
    for batch in _by_start(span for span in spans if span.key in links):
        members = _members(batch) if batch.name == names.BATCH_FORWARD else "waited for"
        yield f"linked: {members}, trace {batch.trace_id}"
        yield _line(batch, start, scale, 0)


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


def _by_start(spans: Iterator[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))

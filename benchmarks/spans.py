"""What a span costs: the SDK's live spans and encoder, and ours made of records.

    python benchmarks/spans.py

Prints microseconds per span, the median of several rounds, one process on one core. The SDK's live span is paid on the
calling thread; all else off the request path.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from deployments.messages import Carrier, Envelope
from deployments.telemetry.export.otlp_json import JsonEncoder, readable
from deployments.telemetry.records import TokenizeRecord
from deployments.telemetry.spans import SpanFactory

SPANS, ROUNDS = 2_000, 9
RESOURCE = Resource({"service.name": "slowlens.tokenizer"})
ATTRIBUTES = {f"ai.preprocess.attribute_{number}": number for number in range(6)}


class Keep(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


def live(count: int) -> None:
    for _ in range(count):
        with TRACER.start_as_current_span("preprocess") as span:
            for key, value in ATTRIBUTES.items():
                span.set_attribute(key, value)


def timed(work: Callable[[], object]) -> float:
    """Return microseconds per span."""
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        rounds.append((time.perf_counter() - started) / SPANS * 1e6)
    return statistics.median(rounds)


PROVIDER = TracerProvider(resource=RESOURCE)
PROVIDER.add_span_processor(Keep())
TRACER = PROVIDER.get_tracer("benchmark")


def main() -> None:
    envelope = Envelope(Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01"), "id", 0, 10**9)
    factory = SpanFactory(RandomIdGenerator(), "model", 32, 0.0, 1_700_000_000 * 10**9)
    records = [TokenizeRecord(envelope, number, number + 500, slow_ms=1e9) for number in range(SPANS)]
    spans = [span for record in records for span in factory.spans(record)]
    of_sdk = [readable(span, RESOURCE) for span in spans]
    encoder = JsonEncoder(RESOURCE)
    rows = {
        "a record": lambda: [TokenizeRecord(envelope, 0, 500) for _ in range(SPANS)],
        "SDK: live span, six attributes": lambda: live(SPANS),
        "a span made of a record": lambda: [span for record in records for span in factory.spans(record)],
        "OTLP JSON": lambda: encoder.line(map(encoder.span, spans)),
        "SDK: OTLP JSON": lambda: encode_spans(of_sdk).to_json(),
    }
    print("| what | us per span |\n| --- | --- |")
    for name, work in rows.items():
        print(f"| {name} | {timed(work):.1f} |")


if __name__ == "__main__":
    main()

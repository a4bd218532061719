"""Measure the time and memory that ``slowlens why`` needs for many requests.

    python benchmarks/explain_size.py                    # 25,000, 50,000 and 100,000 requests
    python benchmarks/explain_size.py 1000 10000

Writes stores of synthetic requests (twelve spans each, four processes, files of 16 MB, as the application writes them)
to a temporary folder, and runs the command on them. For 100,000 requests the folder takes about 1 GB.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHY = [str(Path(sys.executable).parent / "slowlens"), "why", "--source"]
LINES_MB, SPANS_A_LINE = 16, 60
BEGIN_NS, EVERY_NS = 1_750_000_000 * 10**9, 5_000_000


class Store:
    """Writes the spans of each process to separate files, as the local store does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        self._files: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}

    def add(self, service: str, span: dict[str, Any]) -> None:
        spans = self._waiting.setdefault(service, [])
        spans.append(span)
        if len(spans) == SPANS_A_LINE:
            self._write(service)

    def close(self) -> None:
        for service in self._waiting:
            self._write(service)
            self._files[service].close()

    def _write(self, service: str) -> None:
        file = self._files.get(service)
        if file is None or file.tell() > LINES_MB * 1_000_000:
            self._numbers[service] = self._numbers.get(service, -1) + 1
            file = (self._folder / f"traces-{service}-1-{self._numbers[service]:06d}.jsonl").open("w")
            self._files[service] = file
        words = {"service.namespace": "slowlens", "service.name": f"slowlens.{service}", "service.instance.id": service}
        attributes = [{"key": key, "value": {"stringValue": value}} for key, value in words.items()]
        scope = {"scope": {"name": "slowlens"}, "spans": self._waiting[service]}
        line = {"resourceSpans": [{"resource": {"attributes": attributes}, "scopeSpans": [scope]}]}
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._waiting[service] = []


def write(folder: Path, requests: int) -> None:
    store, chance = Store(folder), random.Random(1)
    for number in range(requests):
        for service, span in request(chance, BEGIN_NS + number * EVERY_NS):
            store.add(service, span)
    store.close()


def request(chance: random.Random, at_ns: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """One request alone in its run; about every 20th waits for the device."""
    trace, run = f"{chance.getrandbits(128):032x}", f"{chance.getrandbits(128):032x}"
    tokens, wait_ms = chance.randint(4, 40), 80.0 if chance.random() < 0.05 else chance.random()
    forward_ms = 5 + 0.3 * tokens + chance.random()
    clock = at_ns

    def span(name: str, ident: str, parent: str, start: int, ms: float, **attributes: float | str) -> dict[str, Any]:
        made: dict[str, Any] = {
            "traceId": trace,
            "spanId": ident * 16,
            "parentSpanId": parent * 16,
            "name": name,
            "kind": 1,
            "startTimeUnixNano": str(start),
            "endTimeUnixNano": str(start + int(ms * 1e6)),
            "attributes": [{"key": key.replace("__", "."), "value": value(of)} for key, of in attributes.items()],
            "status": {},
        }
        return made

    def hop(stage: str, name: str, ident: str, own: str, ms: float, **attributes: float | str) -> None:
        nonlocal clock
        made.append(("ingress", span(f"ai.hop.{stage}", ident, "1", clock, ms + 4, ai__hop__transit_ms=4.0)))
        made.append((stage, span(name, own, ident, clock + 2_000_000, ms, **attributes)))
        clock += int((ms + 4) * 1e6)

    made: list[tuple[str, dict[str, Any]]] = [("ingress", span("ai.inference.validate", "2", "1", clock, 1.0))]
    clock += 1_000_000
    hop("tokenizer", "ai.inference.preprocess", "3", "4", 0.5, ai__preprocess__token_count=tokens)
    begun = clock + 2_000_000
    hop("model", "ai.inference.batched_predict", "5", "6", wait_ms + forward_ms, ai__model__load_type="warm")
    made.append(("model", span("ai.inference.queue", "7", "6", begun, wait_ms, ai__queue__device_busy_ms=wait_ms)))
    begun += int(wait_ms * 1e6)
    passed = span("ai.inference.forward_pass", "8", "6", begun, forward_ms, ai__batch__actual_size=1)
    ran = span("ai.inference.batch_forward", "9", "", begun, forward_ms, ai__batch__actual_size=1)
    ran["attributes"] += [
        {"key": f"ai.batch.{name}", "value": value(tokens)} for name in ("tokens", "padded_tokens", "queue_behind")
    ]
    passed["links"] = [{"traceId": run, "spanId": "9" * 16}]
    ran |= {"traceId": run, "links": [{"traceId": trace, "spanId": "8" * 16}]}
    made += [("model", passed), ("model", ran)]
    hop("postprocessor", "ai.inference.postprocess", "a", "b", 0.4)
    made.append(("ingress", span("ai.inference.respond", "c", "1", clock, 0.1)))
    took_ms = (clock - at_ns) / 1e6 + 0.1
    known: dict[str, Any] = {
        "http__route": "/v1/embeddings",
        "gen_ai__usage__input_tokens": tokens,
        "ai__input_length": 4 * tokens,
    }
    known |= {f"ai__made__up_{number}": "as many attributes as a real one" for number in range(8)}
    made.append(("ingress", span("ai.inference.predict", "1", "", at_ns, took_ms, **known)))
    yield from made


def value(of: float | str) -> dict[str, Any]:
    if isinstance(of, str):
        return {"stringValue": of}
    return {"intValue": str(of)} if isinstance(of, int) else {"doubleValue": of}


def main() -> int:
    print("| requests | spans | MB | seconds | MB of memory at most |\n| --- | --- | --- | --- | --- |")
    for requests in [int(given) for given in sys.argv[1:]] or [25_000, 50_000, 100_000]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, requests)
            megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            begun = time.perf_counter()
            process = subprocess.Popen([*WHY, name], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begun
        assert status == 0, f"slowlens why ended with {status}"
        print(f"| {requests:,} | {12 * requests:,} | {megabytes:.0f} | {seconds:.1f} | {used.ru_maxrss / 1e3:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The verdict as text and as JSON (its schema is public: README, "Why")."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from deployments.explain.parts import PARTS
from deployments.explain.verdict import Verdict

_WIDTH, _PAGE = 30, 110


def as_json(verdict: Verdict) -> str:
    excess = sum(max(0.0, ms) for ms in verdict.excess_ms.values())
    total = sum(verdict.latencies_ms)
    begun, ended = verdict.window_ns
    document = {
        "schema": 1,
        "window": {"from": _time(begun), "to": _time(ended)},
        "requests": verdict.requests,
        "incomplete": verdict.incomplete,
        "errors": verdict.errors,
        "latency_ms": {**_percentiles(verdict.latencies_ms)},
        "stages": [_stage(verdict, part, total, excess) for part in PARTS],
        "findings": [
            {
                "cause": finding.cause,
                "share_of_excess": round(finding.share_of_excess, 4),
                "requests": finding.requests,
                "summary": finding.summary,
                "fix": finding.fix,
                "evidence": [{"trace_id": trace_id, "value_ms": round(ms, 3)} for trace_id, ms in finding.evidence],
            }
            for finding in verdict.findings
        ],
        "unaccounted_share": round(sum(p["unaccounted"] for p in verdict.parts) / total, 6) if total else 0.0,
    }
    return json.dumps(document, indent=2)


def as_text(verdict: Verdict) -> Iterator[str]:
    begun, ended = verdict.window_ns
    failed = sum(verdict.errors.values())
    yield (
        f"{verdict.requests} requests in {(ended - begun) / 1e9:.0f} s"
        + (f", {failed} failed" if failed else "")
        + (f", {verdict.incomplete} with spans missing" if verdict.incomplete else "")
    )
    if verdict.latencies_ms:
        yield "latency: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in _percentiles(verdict.latencies_ms).items())
    if verdict.note:
        yield ""
        yield verdict.note
    for number, finding in enumerate(verdict.findings, 1):
        share = f" ({finding.share_of_excess:.0%} of the excess)" if finding.share_of_excess else ""
        yield ""
        yield f"{number}. {finding.cause}{share}"
        yield from _wrapped(finding.summary)
        yield from _wrapped(f"fix: {finding.fix}")
        for trace_id, ms in finding.evidence:
            yield f"   slowlens trace {trace_id}" + (f"   {ms:.0f} ms" if ms else "")
    yield ""
    yield from _table(verdict)


def _table(verdict: Verdict) -> Iterator[str]:
    total, excess = sum(verdict.latencies_ms), sum(max(0.0, ms) for ms in verdict.excess_ms.values())
    if not total:
        return
    yield f"{'spent on':<16} {'p50 ms':>9} {'p99 ms':>9} {'of total':>9} {'of excess':>9}"
    for part in PARTS:
        row = _stage(verdict, part, total, excess)
        if row["p99_ms"] or row["share_of_total"]:
            bar = "#" * round(_WIDTH * row["share_of_total"])
            name = part.replace("_", " ")
            yield (
                f"{name:<16} {row['p50_ms']:>9.2f} {row['p99_ms']:>9.2f} {row['share_of_total']:>9.1%} "
                f"{row['share_of_excess']:>9.1%} {bar}"
            ).rstrip()


def _stage(verdict: Verdict, part: str, total_ms: float, excess_ms: float) -> dict[str, Any]:
    values = sorted(parts[part] for parts in verdict.parts)
    return {
        "stage": part,
        "p50_ms": round(_percentile(values, 0.5), 3),
        "p99_ms": round(_percentile(values, 0.99), 3),
        "share_of_total": round(sum(values) / total_ms, 4) if total_ms else 0.0,
        "share_of_excess": round(max(0.0, verdict.excess_ms[part]) / excess_ms, 4) if excess_ms else 0.0,
    }


def _percentiles(ascending: Sequence[float]) -> dict[str, float]:
    wanted = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(_percentile(ascending, share), 3) for name, share in wanted.items()}


def _percentile(ascending: Sequence[float], share: float) -> float:
    """The nearest rank; 0 of nothing."""
    if not ascending:
        return 0.0
    return ascending[min(len(ascending) - 1, max(0, -int(-share * len(ascending) // 1) - 1))]


def _time(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _PAGE, initial_indent="   ", subsequent_indent="   ")

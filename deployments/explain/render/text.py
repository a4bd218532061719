"""The verdict as JSON (its schema is public: README, "Why was it slow?") and as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deployments.explain.findings import Finding
from deployments.explain.fixes import Change
from deployments.explain.render.sample import (
    as_document,
    by_metrics,
    doubts,
    intervals,
    of_a_sample,
    percentiles,
    sampling,
)
from deployments.explain.requests.parts import PARTS
from deployments.explain.requests.pattern import clock
from deployments.explain.token_gaps import TokenGap
from deployments.explain.traces.weights import percentile
from deployments.explain.verdict import Verdict

_WIDTH = 30


def as_json(verdict: Verdict) -> str:
    survey = verdict.capture.survey
    parts = stages(verdict)
    begun, ended = survey.window_ns
    unaccounted = next(row["share_of_total"] for row in parts if row["stage"] == "unaccounted")
    document = {
        "schema": 1,
        "window": {"from": iso_time(begun), "to": iso_time(ended)},
        "requests": survey.requests,
        "sampling": sampling(verdict),
        "models": {name: round(count) for name, count in sorted(survey.models.items())},
        "incomplete": verdict.capture.incomplete,
        "errors": survey.errors,
        "latency_ms": percentiles(survey.latencies_ms, survey.latency_weights),
        **as_document(verdict.capture.counted),
        **_compared(verdict),
        "stages": parts,
        "findings": _findings(verdict),
        "unaccounted_share": unaccounted,
    }
    first = verdict.first_token
    if first is not None:
        document["first_token"] = {"latency_ms": percentiles(_latencies(first)), "findings": _findings(first)}
        document["slow_tokens"] = [_token_gap(gap) for gap in verdict.token_gaps]
    return json.dumps(document, indent=2)


def _compared(verdict: Verdict) -> dict[str, Any]:
    """What the window is compared with, or since when it is different."""
    found: dict[str, Any] = {}
    if verdict.against is not None:
        other = verdict.against.capture.survey
        found["against"] = {
            "from": iso_time(other.window_ns[0]),
            "to": iso_time(other.window_ns[1]),
            "requests": other.requests,
            "latency_ms": percentiles(other.latencies_ms, other.latency_weights),
            "differences": list(verdict.differences),
        }
    if verdict.change is not None:
        before, after = verdict.change.p50_ms
        found["change"] = {
            "at": iso_time(verdict.change.moment_ns),
            "p50_ms": {"before": round(before, 3), "after": round(after, 3)},
            "differences": list(verdict.change.differences),
        }
    return found


def _findings(verdict: Verdict) -> list[dict[str, Any]]:
    return [
        {
            "cause": finding.cause,
            "share_of_excess": round(finding.share_of_excess, 4),
            "requests": finding.requests,
            "summary": finding.summary,
            "fix": fix_text(finding),
            "evidence": [{"trace_id": trace_id, "value_ms": round(ms, 3)} for trace_id, ms in finding.evidence],
        }
        for finding in verdict.findings
    ]


def _token_gap(gap: TokenGap) -> dict[str, Any]:
    return {
        "trace_id": gap.trace_id,
        "token": gap.token,
        "gap_ms": round(gap.gap_ms, 3),
        "usual_ms": round(gap.usual_ms, 3),
        "preempted_ms": round(gap.preempted_ms, 3),
        "prompt_tokens": gap.prompt_tokens,
        "prompts_of": list(gap.prompts_of),
    }


def _latencies(verdict: Verdict) -> list[float]:
    return [sum(one.parts.values()) for one in verdict.answered]


def as_text(verdict: Verdict) -> RenderableType:
    return Group(*_text(verdict))


def _text(verdict: Verdict) -> Iterator[RenderableType]:
    for line in doubts(verdict):
        yield Text(line, style="bold yellow")
    yield Text(headline(verdict), style="bold")
    if verdict.capture.survey.latencies_ms:
        survey = verdict.capture.survey
        shown = percentiles(survey.latencies_ms, survey.latency_weights)
        between = intervals(survey)
        yield Text(
            "latency: "
            + ", ".join(
                f"{name} {ms:.0f} ms" + (" ({:.0f} to {:.0f})".format(*between[name]) if name in between else "")
                for name, ms in shown.items()
            )
        )
    for line in (*by_metrics(verdict.capture.counted), *comparison(verdict)):
        yield Text(line)
    if verdict.note:
        yield Text()
        yield Text(verdict.note, style="green")
    for number, finding in enumerate(verdict.findings, 1):
        yield Text()
        yield from _finding(number, finding)
    yield Text()
    if verdict.answered:
        yield _table(verdict)
    if verdict.first_token is not None:
        yield from _first_token(verdict.first_token)
    if verdict.token_gaps:
        yield Text()
        yield Text("longest waits for a token in slow generations:", style="bold")
        for gap in verdict.token_gaps:
            yield Padding(Text(f"{gap}\nin slowlens trace {gap.trace_id}"), (0, 0, 0, 3))


def _first_token(verdict: Verdict) -> Iterator[RenderableType]:
    shown = percentiles(_latencies(verdict))
    yield Text()
    yield Text("time to first token: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in shown.items()), style="bold")
    for number, finding in enumerate(verdict.findings, 1):
        yield Text()
        yield from _finding(number, finding)


def headline(verdict: Verdict) -> str:
    survey, incomplete = verdict.capture.survey, verdict.capture.incomplete
    if not survey.requests:
        return "no requests"
    begun, ended = survey.window_ns
    failed = sum(survey.errors.values())
    return (
        f"{survey.requests} requests in {(ended - begun) / 1e9:.0f} s, {clock(begun)} to {clock(ended)}"
        + (f", {failed} failed" if failed else "")
        + (f", {incomplete} with spans missing" if incomplete else "")
        + (f"; {of_a_sample(survey.sample)}" if survey.sample.is_sample else "")
    )


def comparison(verdict: Verdict) -> Iterator[str]:
    """Yield lines that say whose requests these are, if it is not clear; what the window is compared with, or since
    when requests take longer.
    """
    models = verdict.capture.survey.models
    if len(models) > 1:
        listed = ", ".join(f"{name} {count:.0f}" for name, count in sorted(models.items(), key=lambda one: -one[1]))
        yield f"of {len(models)} models: {listed}; --model NAME looks at one alone"
    if verdict.against is not None:
        other = verdict.against.capture.survey
        found = percentiles(other.latencies_ms, other.latency_weights)
        shown = ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items())
        begun, ended = map(iso_time, other.window_ns)
        yield f"compared with {other.requests} requests, {begun} to {ended}: {shown}"
        if verdict.differences:
            yield f"what else is different: {'; '.join(verdict.differences)}"
    if verdict.change is not None:
        before, after = verdict.change.p50_ms
        since = clock(verdict.change.moment_ns)
        yield f"since {since} requests take longer: p50 {before:.0f} -> {after:.0f} ms"
        if verdict.change.differences:
            yield f"what else is different since: {'; '.join(verdict.change.differences)}"


def _finding(number: int, finding: Finding) -> Iterator[RenderableType]:
    share = f" ({share_of(finding)} of the excess)" if finding.share_of_excess else ""
    style = "bold red" if finding.share_of_excess else "bold yellow"
    yield Text.assemble((f"{number}. {finding.cause}", style), share)
    yield Padding(Text(finding.summary), (0, 0, 0, 3))
    yield Padding(Text.assemble(("fix: ", "green"), fix_text(finding)), (0, 0, 0, 3))
    for trace_id, ms in finding.evidence:
        yield Padding(Text(f"slowlens trace {trace_id}" + (f"   {ms:.0f} ms" if ms else ""), "dim"), (0, 0, 0, 3))


def fix_text(finding: Finding) -> str:
    """``smaller batches: batching.max_batch_tokens: 8192 -> 4096; at best p99 810 -> 443 ms``."""
    text = "".join(_change(piece) if isinstance(piece, Change) else piece for piece in finding.fix.pieces)
    if finding.predicted_p99_ms is not None:
        before, after = finding.predicted_p99_ms
        return f"{text}; predicted p99 {before:.0f} -> {after:.0f} ms"
    if finding.p99_ms is not None:
        before, after = finding.p99_ms
        text += f"; at best p99 {before:.0f} -> {after:.0f} ms"
    return text


def _change(change: Change) -> str:
    """``batching.max_batch_tokens: 8192 -> 4096``."""
    if change.current is None:
        return f"{change.key}: {change.proposed}"
    before = f"{change.current:g}" if isinstance(change.current, float) else change.current
    return f"{change.key}: {before} -> {change.proposed}"


def share_of(finding: Finding) -> str:
    """``12%``, or ``under 1%`` if it rounds to zero."""
    return f"{finding.share_of_excess:.0%}" if finding.share_of_excess >= 0.005 else "under 1%"


def _table(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("spent on")
    for heading in ("p50 ms", "p99 ms", "of total", "of excess"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for cells, share in rows(verdict):
        table.add_row(*cells, "#" * round(_WIDTH * share))
    return table


def rows(verdict: Verdict) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the parts that took any time, formatted, with their share of the total."""
    for row in stages(verdict):
        if row["p99_ms"] or row["share_of_total"]:
            times = (f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
            shares = (f"{row['share_of_total']:.1%}", f"{row['share_of_excess']:.1%}")
            yield (row["stage"].replace("_", " "), *times, *shares), row["share_of_total"]


def stages(verdict: Verdict) -> list[dict[str, Any]]:
    """Return one row per part of the latency, in the order of a request's path."""
    excess = verdict.whole_excess_ms
    total = sum(one.weight * sum(one.parts.values()) for one in verdict.answered)
    made = []
    for part in PARTS:
        values = sorted((one.parts[part], one.weight) for one in verdict.answered)
        made.append(
            {
                "stage": part,
                "p50_ms": round(percentile(values, 0.5), 3),
                "p99_ms": round(percentile(values, 0.99), 3),
                "share_of_total": round(sum(ms * weight for ms, weight in values) / total, 6) if total else 0.0,
                "share_of_excess": round(max(0.0, verdict.excess_ms[part]) / excess, 4) if excess else 0.0,
            }
        )
    return made


def iso_time(unix_ns: int) -> str:
    """``2026-11-25T10:00:00.000Z``."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

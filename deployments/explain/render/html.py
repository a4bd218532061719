"""The verdict as one page that works offline: findings, charts, and the traces that the charts link to.

Charts are drawn by Chart.js (https://www.chartjs.org, ``assets/chart.js``), which is embedded in the page like
everything else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from deployments.explain.findings import Finding
from deployments.explain.periods import Judged
from deployments.explain.render.sample import by_metrics, doubts, percentiles
from deployments.explain.render.text import comparison, fix_text, headline, rows, share_of
from deployments.explain.render.timeline import timeline
from deployments.explain.render.waterfall import MOST_MEMBERS, aligned, label, ordered, shown
from deployments.explain.requests.capture import BINS, Run, bin_ns
from deployments.explain.requests.parts import fit_runs, median
from deployments.explain.requests.request import Request
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Key
from deployments.explain.verdict import Verdict

_POINTS = 250
"""Maximum number of ordinary, and of slow, requests in a scatter plot."""
_LATENCY_BINS = 40
_SCRIPTS, _STYLE = ("chart.js", "page.js"), "page.css"
_GROUPS = {
    "reading": ("validation",),
    "tokenization": ("tokenization",),
    "waiting for a replica": ("replica_wait", "cold_start"),
    "device busy": ("device_busy", "batch_mates"),
    "batch fill": ("batch_fill",),
    "own work": ("own_work",),
    "behind long inputs": ("others_work",),
    "padding": ("padding",),
    "KV cache": ("cache_wait", "preempted"),
    "own prefill": ("own_prefill",),
    "others' prefill": ("others_prefill",),
    "decode": ("decode",),
    "decode neighbours": ("decode_neighbours",),
    "contention": ("contention",),
    "waiting for a CPU": ("cpu_starved",),
    "postprocessing": ("postprocessing",),
    "slow reader": ("slow_reader",),
    "lost attempts": ("lost_attempt",),
    "transit": ("transit", "response"),
    "before the ingress": ("front",),
    "unaccounted": ("unaccounted",),
}


def as_html(verdict: Verdict) -> str:
    content = {
        "headline": html.escape(headline(verdict)),
        "figures": "".join(
            f"<li><b>{ms:.0f} ms</b><span>{name}</span></li>"
            for name, ms in percentiles(
                verdict.capture.survey.latencies_ms, verdict.capture.survey.latency_weights
            ).items()
        ),
        "findings": _findings(verdict),
        "stages": "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells, _ in rows(verdict)),
        # A "<" in a string must not end the script.
        "data": json.dumps(_Data(verdict).document(), separators=(",", ":")).replace("<", "\\u003c"),
        "policy": content_security_policy(),
        **{name: _asset(name) for name in (*_SCRIPTS, _STYLE)},
    }
    page = _asset("page.html")
    # Each once and in one pass: the inserted content may contain braces.
    pieces = [piece.partition("}}") for piece in page.split("{{")]
    return pieces[0][0] + "".join(content[name] + rest for name, _, rest in pieces[1:])


@functools.cache
def content_security_policy() -> str:
    """Allow what the page consists of, by its hashes, and nothing that a text of a trace may have smuggled into it."""

    def hashed(name: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()}'"

    scripts = " ".join(map(hashed, _SCRIPTS))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {hashed(_STYLE)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


@functools.cache
def _asset(name: str) -> str:
    text = (files("deployments.explain.render") / "assets" / name).read_text("utf-8")
    return text.partition("//# sourceMappingURL")[0]


def _findings(verdict: Verdict) -> str:
    notes = [
        *doubts(verdict),
        *by_metrics(verdict.capture.counted),
        *comparison(verdict),
        *([verdict.note] if verdict.note else []),
    ]
    said = "".join(f'<div class="finding none"><p>{html.escape(note)}</p></div>' for note in notes)
    return said + "".join(map(_finding, verdict.findings))


def _finding(finding: Finding) -> str:
    share = f" {share_of(finding)} of the excess" if finding.share_of_excess else ""
    traces = "".join(
        f'<li><a class="trace-id" href="#{html.escape(trace_id)}">{html.escape(trace_id)}</a>'
        + (f" {ms:.0f} ms" if ms else "")
        + "</li>"
        for trace_id, ms in finding.evidence
    )
    return (
        f'<div class="finding{"" if share else " advice"}"><h2><b>{finding.cause}</b>{share}</h2>'
        f"<p>{html.escape(finding.summary)}</p><p><b>Fix:</b> {html.escape(fix_text(finding))}</p>"
        f"<ul>{traces}</ul></div>"
    )


class _Data:
    """The data that the page's script draws, with the trace that best shows each mark."""

    def __init__(self, verdict: Verdict) -> None:
        self._verdict, self._capture = verdict, verdict.capture
        window_ns = self._capture.survey.window_ns
        self._begin_ns, self._width_ns = window_ns[0], bin_ns(window_ns)
        self._used: dict[str, Request] = {}
        self._bins: list[list[Judged]] = [[] for _ in range(BINS)]
        for one in verdict.answered:
            self._bins[self._bin(one.request.started_ns)].append(one)

    def document(self) -> dict[str, Any]:
        slowest = [max(ones, key=lambda one: one.request.latency_ns, default=None) for ones in self._bins]
        document = {
            "bins": [(self._begin_ns + number * self._width_ns) / 1e6 for number in range(BINS)],
            "bin_ms": self._width_ns / 1e6,
            "best": [self._use(one.request) if one is not None else None for one in slowest],
            "causes": self._causes(),
            "timeline": timeline(self._verdict, self._use),
            "latency": self._latency(),
            "cold": self._cold(),
            "device": self._device(),
            "tokens": self._tokens(),
            "batches": self._batches(),
        }
        evidence = {trace_id for finding in self._verdict.findings for trace_id, _ in finding.evidence}
        for request in self._capture.requests:
            if request.trace_id in evidence:
                self._use(request)
        document["charts"] = self._charts(document)
        document["traces"] = {trace_id: self._trace(request) for trace_id, request in self._used.items()}
        return document

    def _charts(self, document: dict[str, Any]) -> list[dict[str, str]]:
        cold = "When model replicas loaded, and how many requests waited for them."
        if not document["cold"]["loads"] and not any(document["cold"]["requests"]):
            cold = "No model replica loaded and no request waited for one."
        texts = {
            "causes": (
                "Latency by cause",
                "How many requests took how long, and the named cause that they lost most time to.",
            ),
            "timeline": ("The device around the longest wait", _timeline_text(document["timeline"])),
            "latency": ("Latency by stage", "Where a request's time went, on average, by arrival time."),
            "cold": ("Cold starts", cold),
            "device": (
                "GPU utilisation against latency",
                document["device"]["what"] + ", and the latency of the requests that arrived at that time.",
            ),
            "tokens": ("Tokens against forward time", "Above the line: batch-mates, padding, or a slow device."),
            "batches": ("Batch efficiency", "How full the model runs were, and how much of them was padding."),
        }
        return [{"name": name, "title": title, "text": text} for name, (title, text) in texts.items()]

    def _bin(self, at_ns: int) -> int:
        return min(BINS - 1, max(0, (at_ns - self._begin_ns) // self._width_ns))

    def _use(self, request: Request) -> str:
        self._used[request.trace_id] = request
        return request.trace_id

    # --- the charts ---

    def _causes(self) -> dict[str, Any]:
        """Requests by latency, in bins that each are so many times as wide as the one before."""
        answered, lost_to = self._verdict.answered, self._verdict.lost_to
        if not answered:
            return {"edges": [], "causes": []}
        least, most = (max(0.1, one.request.latency_ns / 1e6) for one in (answered[0], answered[-1]))
        factor = max(1.05, (most / least) ** (1 / _LATENCY_BINS))
        edges = [least * factor**number for number in range(_LATENCY_BINS + 1)]
        names = [finding.cause for finding in self._verdict.findings if finding.cause in lost_to.values()]
        counts = {name: [0.0] * _LATENCY_BINS for name in ("", *names)}
        traces: dict[str, list[str | None]] = {name: [None] * _LATENCY_BINS for name in counts}
        for one in answered:
            at = min(_LATENCY_BINS - 1, max(0, bisect_right(edges, one.request.latency_ns / 1e6) - 1))
            name = lost_to.get(one.request.key, "")
            if not counts[name][at]:
                traces[name][at] = self._use(one.request)
            counts[name][at] += one.weight
        causes = [
            {
                "cause": name or "no cause",
                "requests": [round(count, 1) for count in counts[name]],
                "traces": traces[name],
            }
            for name in counts
        ]
        return {"edges": [round(edge, 3) for edge in edges], "causes": causes}

    def _latency(self) -> list[dict[str, Any]]:
        def mean(ones: Sequence[Judged], parts: Iterable[str]) -> float:
            weight = sum(one.weight for one in ones)
            return sum(one.weight * sum(one.parts[part] for part in parts) for one in ones) / weight if weight else 0.0

        groups = [
            {"part": group, "ms": [round(mean(ones, parts), 3) for ones in self._bins]}
            for group, parts in _GROUPS.items()
        ]
        return [group for group in groups if any(group["ms"])]

    def _cold(self) -> dict[str, Any]:
        cold = [[one.request for one in ones if one.request.is_cold] for ones in self._bins]
        longest = [max(requests, key=lambda r: r.breakdown.cold_start, default=None) for requests in cold]
        loads = [
            {"x": load.started_ns / 1e6, "y": round(load.took_ns / 1e9, 3), "trace": self._who_waited(load.started_ns)}
            for load in self._capture.loads
        ]
        return {
            "requests": [len(requests) for requests in cold],
            "traces": [self._use(request) if request is not None else None for request in longest],
            "loads": loads,
        }

    def _who_waited(self, load_ns: int) -> str | None:
        """Return the trace id of the cold request that arrived nearest to the start of the load."""
        cold = (one.request for one in self._verdict.answered if one.request.is_cold)
        nearest = min(cold, key=lambda request: abs(request.started_ns - load_ns), default=None)
        return self._use(nearest) if nearest is not None else None

    def _device(self) -> dict[str, Any]:
        read: dict[int, list[float]] = defaultdict(list)
        for run in self._capture.runs.values():
            if run.gpu_utilization is not None:
                read[self._bin(run.started_ns)].append(run.gpu_utilization)
        busy = self._capture.busy_ns.values()
        share = [100 * sum(replica[number] for replica in busy) / self._width_ns for number in range(BINS)]
        replicas = max(1, len(busy))
        gpu = [round(sum(read[number]) / len(read[number]), 2) if number in read else None for number in range(BINS)]
        latencies = [sorted(one.request.latency_ns / 1e6 for one in ones) for ones in self._bins]
        return {
            "what": "GPU utilisation, %" if read else "Time the device was running batches, % (no GPU in these traces)",
            "percent": gpu if read else [round(value / replicas, 2) for value in share],
            "slowest_ms": [round(ms[-1], 2) if ms else None for ms in latencies],
            "median_ms": [round(median(ms), 2) if ms else None for ms in latencies],
        }

    def _tokens(self) -> dict[str, Any]:
        slow = [one for one in self._verdict.answered if one.is_slow][-_POINTS:]
        others = [one for one in self._verdict.answered if not one.is_slow]
        others = others[:: max(1, len(others) // _POINTS)][:_POINTS]
        fit = fit_runs(self._capture.runs.values())
        most = max((one.request.tokens for one in slow + others), default=0)
        return {
            "slow": [self._point(one) for one in slow],
            "others": [self._point(one) for one in others],
            "fit": [{"x": tokens, "y": round(fit.ms(tokens), 3)} for tokens in (0, most)] if fit is not None else [],
        }

    def _point(self, one: Judged) -> dict[str, Any]:
        forward_ms = round(one.request.breakdown.forward / 1e6, 3)
        return {"x": one.request.tokens, "y": forward_ms, "trace": self._use(one.request)}

    def _batches(self) -> dict[str, Any]:
        bins: list[list[Run]] = [[] for _ in range(BINS)]
        for run in self._capture.runs.values():
            bins[self._bin(run.started_ns)].append(run)
        member_of = {key: request for request in self._capture.requests for key in request.runs}
        padded = [max(runs, key=lambda run: run.padded_tokens - run.tokens, default=None) for runs in bins]
        members = [member_of.get(run.key) if run is not None else None for run in padded]
        return {
            "size": [round(sum(run.size for run in runs) / len(runs), 2) if runs else None for runs in bins],
            "padding": [_padding(runs) for runs in bins],
            "traces": [self._use(request) if request is not None else None for request in members],
        }

    # --- the traces ---

    def _trace(self, request: Request) -> dict[str, Any]:
        spans, _ = aligned(self._capture.spans[request.key], ())
        root, known = spans[0], self._capture.runs
        parts = [(name.replace("_", " "), took / 1e6) for name, took in request.breakdown.parts() if took]
        return {
            "at": root.start_ns / 1e6,
            "ms": request.latency_ns / 1e6,
            "spent": ", ".join(f"{name} {ms:.1f}" for name, ms in parts),
            "spans": [_bar(depth, span, root.start_ns) for depth, span in ordered(spans)],
            "runs": [self._run(key, spans, root.start_ns) for key in dict.fromkeys(request.runs) if key in known],
        }

    def _run(self, key: Key, spans: Sequence[Span], start_ns: int) -> dict[str, Any]:
        """Placed at the request's own part of the run: both are on one clock, which may differ from the page's."""
        run = self._capture.runs[key]
        passed = next(span for span in spans if key in span.links)
        text = (
            f"{run.size} inputs, {run.tokens} tokens and {max(0, run.padded_tokens - run.tokens)} of padding, "
            f"{run.reason or 'no reason given'}, {run.queue_behind} queued behind it"
        )
        bar = [0, "batch_forward", "model", (passed.start_ns - start_ns) / 1e6, run.took_ns / 1e6, run.failed, text]
        members = list(dict.fromkeys(trace_id for trace_id, _ in run.members))
        return {"span": bar, "members": members[:MOST_MEMBERS]}


def _timeline_text(drawn: dict[str, Any]) -> str:
    if not drawn["replica"]:
        return "No request waited for a device."
    return f"What {drawn['replica']} ran, and who waited for it meanwhile, longest waits first."


def _bar(depth: int, span: Span, start_ns: int) -> list[Any]:
    service = span.service.removeprefix("slowlens.")
    start_ms, took_ms = round((span.start_ns - start_ns) / 1e6, 3), round(span.ms, 3)
    return [depth, label(span), service, start_ms, took_ms, span.failed, shown(span)]


def _padding(runs: Sequence[Run]) -> float | None:
    padded = sum(run.padded_tokens for run in runs)
    return round(100 * (1 - sum(run.tokens for run in runs) / padded), 2) if padded else None

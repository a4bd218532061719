"""What the device did around the worst wait: its runs as blocks, what was in them, and who waited for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from deployments.explain.periods import Judged
from deployments.explain.requests.capture import Run
from deployments.explain.requests.parts import SLOW, Usual
from deployments.explain.requests.request import Request
from deployments.explain.verdict import Verdict

_BLOCKS, _WAITING = 120, 16
_AROUND = 0.25
"""How much is shown before and after the worst wait, as a share of it."""
_LEAST_NS = 200 * 10**6
_PADDED = 0.5
"""A run is padded if so much of it was padding."""
Use = Callable[[Request], str]
"""Puts a request's trace on the page, and returns its id."""


def timeline(verdict: Verdict, use: Use) -> dict[str, Any]:
    """The document that the page draws. Times are Unix milliseconds; without a wait for a device there is nothing."""
    worst = max(verdict.answered, key=_waited_ms, default=None)
    replica = worst.request.replicas.get("model", "") if worst is not None else ""
    if worst is None or not _waited_ms(worst) or replica not in verdict.capture.devices:
        return {"replica": "", "blocks": [], "waiting": []}
    ahead_ns = verdict.capture.devices[replica].ahead_ns
    first, last = _waiting(worst, ahead_ns)
    around = max(_LEAST_NS, round(_AROUND * (last - first)))
    begin, end = first - around, last + around
    here = [one for one in verdict.answered if one.request.replicas.get("model") == replica]
    blocks = sorted(_blocks(verdict, here, replica, (begin, end), use), key=lambda block: block["from"])
    waited = [
        (*_waiting(one, ahead_ns), one.request) for one in sorted(here, key=_waited_ms, reverse=True) if _waited_ms(one)
    ]
    then = [(since, until, request) for since, until, request in waited if since < end and until > begin][:_WAITING]
    waiting = [
        {"from": since / 1e6, "to": until / 1e6, "trace": use(request)}
        for since, until, request in sorted(then, key=lambda each: each[0])
    ]
    return {"replica": replica, "blocks": blocks[:_BLOCKS], "waiting": waiting}


def _waiting(one: Judged, ahead_ns: int) -> tuple[int, int]:
    """From when until when it waited in its replica, whose clock is so far ahead of the ingress's."""
    return one.request.waits[0][0] - ahead_ns, one.request.waits[-1][1] - ahead_ns


def _waited_ms(one: Judged) -> float:
    return sum(end - begin for begin, end in one.request.waits) / 1e6


def _blocks(
    verdict: Verdict, here: list[Judged], replica: str, period: tuple[int, int], use: Use
) -> Iterator[dict[str, Any]]:
    begin, end = period
    member_of = {key: one.request for one in here for key in one.request.runs}
    for run in verdict.capture.runs.values():
        if run.replica == replica and run.started_ns < end and run.started_ns + run.took_ns > begin:
            member = member_of.get(run.key)
            yield {
                "from": run.started_ns / 1e6,
                "to": (run.started_ns + run.took_ns) / 1e6,
                "kind": _kind(run, verdict.usual),
                "text": f"{run.size} inputs, {run.tokens} tokens, {max(0, run.padded_tokens - run.tokens)} of padding",
                "trace": use(member) if member is not None else None,
            }
    ahead_ns = verdict.capture.devices[replica].ahead_ns
    by_trace = {one.request.trace_id: one.request for one in here}
    for segment in verdict.capture.segments.values():
        started, ended = segment.started_ns - ahead_ns, segment.ended_ns - ahead_ns
        if segment.replica == replica and started < end and ended > begin:
            whose = next((by_trace[trace] for trace in segment.prompts_of if trace in by_trace), None)
            tokens = f"{segment.prefill_tokens} prompt tokens, {segment.decode_tokens} decoded"
            yield {
                "from": started / 1e6,
                "to": ended / 1e6,
                "kind": "computes prompts" if segment.prefill_tokens else "decodes",
                "text": f"{segment.steps} steps, {tokens}",
                "trace": use(whose) if whose is not None else None,
            }


def _kind(run: Run, usual: Usual) -> str:
    if run.failed:
        return "failed"
    if usual.runs is not None and run.took_ns / 1e6 > SLOW * usual.runs.ms(run.padded_tokens):
        return "slower than usual"
    if usual.sizes.unusual(run.tokens, run.requests):
        return "large requests"
    if run.padded_tokens and 1 - run.tokens / run.padded_tokens > _PADDED:
        return "mostly padding"
    return "ordinary"

"""Each request's latency in parts that indicate a cause: the breakdown, refined with the data of all requests.

1. The cost of a model run is fitted over all runs, ``a + b * padded tokens``. A request's own work is what a run of its
   tokens alone would cost; each token of its batch-mates and of the batch's padding costs ``b``; what the runs took
   beyond that is contention. A request that waited while others ran waited for what made their runs long: their
   padding, requests far larger than usual (``others_work``, also if they were its batch-mates), or contention. What
   remains is waiting for ordinary work.
2. The offset between the clocks of two processes is unknown, but the shortest latency in each direction bounds it. A
   call that took longer on the way to the stage than back waited for its replica to take it, beyond the wait in the
   ingress that the trace states; what was slow in both directions is transit.
3. What threads of the processes waited for a CPU meanwhile, as the kernel counts it, comes off the parts in which they
   worked: where they were contended first.
4. These steps only move time between parts: the sum stays the latency.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.batching.cost import fit_line
from deployments.explain.requests.capture import Capture, Run, Segment
from deployments.explain.requests.device import Device
from deployments.explain.requests.request import Call, Request, quickest_of
from deployments.explain.requests.steps import StepFit, fit_steps, split_decode, split_prefill
from deployments.explain.traces.survey import Key
from deployments.explain.traces.weights import percentile

Parts = dict[str, float]
"""Milliseconds by part."""
PARTS = (
    "front",
    "validation",
    "tokenization",
    "replica_wait",
    "cold_start",
    "device_busy",
    "batch_fill",
    "own_work",
    "others_work",
    "batch_mates",
    "padding",
    "cache_wait",
    "preempted",
    "own_prefill",
    "others_prefill",
    "decode",
    "decode_neighbours",
    "contention",
    "cpu_starved",
    "postprocessing",
    "slow_reader",
    "lost_attempt",
    "transit",
    "response",
    "unaccounted",
)
_BEFORE_THE_FIRST_STEP = (
    "front",
    "validation",
    "tokenization",
    "replica_wait",
    "cold_start",
    "device_busy",
    "cache_wait",
    "lost_attempt",
)
_WORK_OF = {
    "ingress": ("transit", "response", "validation", "replica_wait"),
    "tokenizer": ("tokenization", "transit"),
    "model": (
        "contention",
        "device_busy",
        "own_work",
        "decode",
        "own_prefill",
        "others_prefill",
        "decode_neighbours",
        "batch_mates",
        "transit",
    ),
    "postprocessor": ("postprocessing", "transit"),
}
_ROUNDS = 8
_LONG_OF_MOST, _LONG_OF_USUAL = 2.0, 4.0
"""A request is large if it has this many times the tokens of three quarters of all, and of half of them."""
SLOW = 1.5
"""A run is slow if it took this many times what it should: less is noise."""


@dataclass(frozen=True, slots=True)
class RunFit:
    """Milliseconds of a run: ``run_ms + token_ms * padded tokens``."""

    run_ms: float
    token_ms: float

    def ms(self, padded_tokens: float) -> float:
        return self.run_ms + self.token_ms * padded_tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of a request, in all its inputs."""

    usual: float
    large: float
    """From here on it is far larger than usual."""

    def unusual(self, tokens: float, requests: int) -> float:
        """The tokens that so many requests have beyond the usual, if they are large on average."""
        return max(0.0, tokens - requests * self.usual) if requests and tokens / requests >= self.large else 0.0


@dataclass(frozen=True, slots=True)
class Usual:
    """What work costs, and how much of it is usual: what is beyond is padding, contention, long."""

    runs: RunFit | None = None
    steps: StepFit | None = None
    sizes: Sizes = Sizes(0.0, 1.0)


def usual_of(capture: Capture, until_ns: float = float("inf")) -> Usual:
    """What is usual in a capture, or in that part of it that began before ``until_ns``."""
    return Usual(
        fit_runs(run for run in capture.runs.values() if run.started_ns < until_ns),
        fit_steps(segment for segment in capture.segments.values() if segment.started_ns < until_ns),
        sizes_of(capture, until_ns),
    )


def parts_of(capture: Capture, usual: Usual) -> list[Parts]:
    """Return the parts of each request of the capture, in its order."""
    fit, step_fit, sizes = usual.runs, usual.steps, usual.sizes
    quickest = quickest_of(call for request in capture.requests for call in request.calls)
    found = []
    for request in capture.requests:
        found.append(parts := _parts(request, capture.runs, usual, quickest))
        _split_steps(request, parts, capture.segments, step_fit)
        device = capture.devices.get(request.replicas.get("model", ""))
        if fit is not None and device is not None:
            _pass_on(request, parts, device, fit, sizes)
        _starve(request, parts)
    return found


def first_token_parts_of(capture: Capture, every: Sequence[Parts], fit: StepFit | None) -> list[Parts | None]:
    """Return the parts of each request's time to its first token; None where there is no generation or no token.

    Args:
        capture: the requests.
        every: the parts of their latencies, as ``parts_of`` returns them.
        fit: what steps cost.
    """
    return [_first_token_parts(*both, capture.segments, fit) for both in zip(capture.requests, every, strict=True)]


def _first_token_parts(
    request: Request, whole: Parts, segments: Mapping[Key, Segment], fit: StepFit | None
) -> Parts | None:
    one = request.generation
    if one is None or not one.first_token_ms or not whole:
        return None
    parts = dict.fromkeys(PARTS, 0.0) | {part: whole[part] for part in _BEFORE_THE_FIRST_STEP}
    prefill = split_prefill(one, segments, fit, request.breakdown.prefill / 1e6)
    parts["own_prefill"], parts["others_prefill"] = prefill.own_prefill, prefill.others_prefill
    parts["decode_neighbours"], parts["contention"] = prefill.neighbours, prefill.contention
    known = sum(parts.values())
    if known > one.first_token_ms:
        return {part: ms * one.first_token_ms / known for part, ms in parts.items()}
    # The rest of the calls: what the first token took to the ingress, and what the request took to the stages.
    parts["transit"] = min(whole["transit"], one.first_token_ms - known)
    parts["unaccounted"] = one.first_token_ms - known - parts["transit"]
    return parts


def _split_steps(request: Request, parts: Parts, segments: Mapping[Key, Segment], fit: StepFit | None) -> None:
    one = request.generation
    if one is None:
        return
    prefill = split_prefill(one, segments, fit, parts["own_prefill"])
    decode = split_decode(one, segments, fit, parts["decode"])
    parts["own_prefill"], parts["decode"] = prefill.own_prefill, decode.decode + prefill.decode
    parts["others_prefill"] = prefill.others_prefill + decode.others_prefill
    parts["decode_neighbours"] = prefill.neighbours + decode.neighbours
    parts["contention"] += prefill.contention + decode.contention


def sizes_of(capture: Capture, until_ns: float = float("inf")) -> Sizes:
    """What is usual in the requests that began before ``until_ns``."""
    each = sorted(
        (request.tokens, capture.weight(request)) for request in capture.requests if request.started_ns < until_ns
    )
    usual, most = percentile(each, 0.5), percentile(each, 0.75)
    return Sizes(usual, max(_LONG_OF_MOST * most, _LONG_OF_USUAL * usual, 1.0))


def _pass_on(request: Request, parts: Parts, device: Device, fit: RunFit, sizes: Sizes) -> None:
    """Pass the wait for the device on to what made the runs long that it waited for."""
    padding = others_work = contention = 0.0
    for wait in request.waits:
        for run in device.during(wait):
            within, expected = run.within_ns / 1e6, fit.ms(run.padded_tokens)
            if run.took_ns / 1e6 > SLOW * expected:
                slow = within * (1 - expected / (run.took_ns / 1e6))
                contention += slow
                within -= slow
            a_token = within * fit.token_ms / max(expected, 1e-9)
            padding += a_token * max(0, run.padded_tokens - run.tokens)
            others_work += a_token * sizes.unusual(run.tokens, run.requests)
    waited = padding + others_work + contention
    scale = min(1.0, parts["device_busy"] / waited) if waited else 0.0
    parts["device_busy"] -= waited * scale
    parts["padding"] += padding * scale
    parts["others_work"] += others_work * scale
    parts["contention"] += contention * scale


def _starve(request: Request, parts: Parts) -> None:
    """Move what its threads waited for a CPU from the parts in which they would have worked."""
    for stage, delay_ms in request.starved_ms.items():
        left = delay_ms
        for part in _WORK_OF[stage]:
            taken = min(max(0.0, parts[part]), left)
            parts[part] -= taken
            parts["cpu_starved"] += taken
            left -= taken


def _parts(
    request: Request, runs: Mapping[Key, Run], usual: Usual, quickest: Mapping[tuple[str, str, str], Call]
) -> Parts:
    split = {name: took / 1e6 for name, took in request.breakdown.parts()}
    forward = split.pop("forward")
    split["own_prefill"] = split.pop("prefill")
    parts = dict.fromkeys(PARTS, 0.0) | split
    own, others_work, batch_mates, padding = _work(request, runs, usual, forward)
    parts["own_work"], parts["others_work"], parts["batch_mates"], parts["padding"] = (
        own,
        others_work,
        batch_mates,
        padding,
    )
    parts["contention"] = forward - own - others_work - batch_mates - padding
    # A cold start already includes the whole transit of its call.
    calls = [call for call in request.calls if not (parts["cold_start"] and call.stage == "model")]
    waited = min(parts["transit"], sum(one_sided_ms(call, quickest) for call in calls))
    parts["replica_wait"] += waited
    parts["transit"] -= waited
    return parts


def _work(
    request: Request, runs: Mapping[Key, Run], usual: Usual, forward_ms: float
) -> tuple[float, float, float, float]:
    """Split its forward passes into own work, others' unusual work, batch-mates, padding.

    All is own work if the runs or their cost are unknown.
    """
    known, fit = [runs[key] for key in request.runs if key in runs], usual.runs
    if fit is None or not known or len(known) < len(request.runs):
        return forward_ms, 0.0, 0.0, 0.0
    tokens = sum(run.tokens for run in known)
    own_tokens = min(request.tokens, tokens)
    mates = sum(run.requests - 1 for run in known)
    unusual = usual.sizes.unusual(tokens - own_tokens, mates)
    padded = sum(max(0, run.padded_tokens - run.tokens) for run in known)
    parts = (
        fit.run_ms * len(known) + fit.token_ms * own_tokens,
        fit.token_ms * unusual,
        fit.token_ms * (tokens - own_tokens - unusual),
        fit.token_ms * padded,
    )
    # Runs that were faster than the fit leave no contention, and each part is scaled down accordingly.
    scale = min(1.0, forward_ms / sum(parts)) if sum(parts) else 0.0
    own, others_work, batch_mates, padding = (ms * scale for ms in parts)
    return own, others_work, batch_mates, padding


def fit_runs(runs: Iterable[Run]) -> RunFit | None:
    """Weighted least squares of the relative errors, with slow outliers down-weighted (Huber). None without runs."""
    points = [(run.padded_tokens, run.took_ns / 1e6) for run in runs if run.took_ns > 0 and not run.failed]
    if not points:
        return None
    weights = [1.0] * len(points)
    fit = RunFit(0.0, 0.0)
    for _ in range(_ROUNDS):
        fit = _fit(points, weights)
        errors = [(took - fit.ms(tokens)) / took for tokens, took in points]
        scale = max(0.02, median([abs(error) for error in errors]))
        weights = [min(1.0, scale / max(error, 1e-9)) for error in errors]
    return fit


def _fit(points: Sequence[tuple[int, float]], weights: Sequence[float]) -> RunFit:
    run_ms, token_ms = fit_line(points, [w / took**2 for w, (_, took) in zip(weights, points, strict=True)])
    return RunFit(max(0.0, run_ms), token_ms)


def one_sided_ms(call: Call, quickest: Mapping[tuple[str, str, str], Call]) -> float:
    """How much longer a call was on the way to its stage than back, beyond the quickest between the two."""
    best = quickest[(call.stage, *call.between)]
    return max(0, (call.there_ns - best.there_ns) - (call.back_ns - best.back_ns)) / 1e6


def median(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The upper median, of values that stand for one each or for as many as their weights say; 0 if there are none."""
    if weights is None:
        return sorted(values)[len(values) // 2] if values else 0.0
    pairs = sorted(zip(values, weights, strict=True))
    left = sum(weights) / 2
    for value, weight in pairs:
        left -= weight
        if left < 0:
            return value
    return pairs[-1][0] if pairs else 0.0

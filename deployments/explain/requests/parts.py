"""Each request's latency in parts that indicate a cause: the breakdown, refined with the data of all requests.

1. The cost of a model run is fitted over all runs, ``a + b * padded tokens``. A request's own work is what a run of its
   tokens alone would cost; each token of its batch-mates and of the batch's padding costs ``b``; what the runs took
   beyond that is contention. A request that waited while others ran also waited for their padding.
2. The offset between the clocks of two processes is unknown, but the shortest latency in each direction bounds it. A
   call that took longer on the way to the stage than back waited for a replica to take it; what was slow in both
   directions is transit.
3. Both steps only move time between parts: the sum stays the latency.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.batching.cost import fit_line
from deployments.explain.requests.capture import Capture, Run
from deployments.explain.requests.device import Device
from deployments.explain.requests.request import Call, Request, quickest_of
from deployments.explain.traces.survey import Key

Parts = dict[str, float]
"""Milliseconds by part."""
PARTS = (
    "validation",
    "tokenization",
    "replica_wait",
    "cold_start",
    "device_busy",
    "batch_fill",
    "own_work",
    "batch_mates",
    "padding",
    "contention",
    "postprocessing",
    "transit",
    "response",
    "unaccounted",
)
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class RunFit:
    """Milliseconds of a run: ``run_ms + token_ms * padded tokens``."""

    run_ms: float
    token_ms: float

    def ms(self, padded_tokens: float) -> float:
        return self.run_ms + self.token_ms * padded_tokens


def parts_of(capture: Capture) -> list[Parts]:
    """Return the parts of each request of the capture, in its order."""
    fit = fit_runs(capture.runs.values())
    quickest = quickest_of(call for request in capture.requests for call in request.calls)
    found = []
    for request in capture.requests:
        found.append(parts := _parts(request, capture.runs, fit, quickest))
        device = capture.devices.get(request.replicas.get("model", ""))
        if fit is not None and device is not None:
            waited = min(parts["device_busy"], _padding_ms(request, device, fit))
            parts["device_busy"] -= waited
            parts["padding"] += waited
    return found


def _padding_ms(request: Request, device: Device, fit: RunFit) -> float:
    """Return how long the runs that the request waited for spent on padding."""
    return sum(
        within / 1e6 * fit.token_ms * max(0, padded - tokens) / max(fit.ms(padded), 1e-9)
        for wait in request.waits
        for within, tokens, padded in device.during(wait)
    )


def _parts(
    request: Request, runs: Mapping[Key, Run], fit: RunFit | None, quickest: Mapping[tuple[str, str, str], Call]
) -> Parts:
    split = {name: took / 1e6 for name, took in request.breakdown.parts()}
    forward = split.pop("forward")
    parts = dict.fromkeys(PARTS, 0.0) | split
    own, batch_mates, padding = _work(request, runs, fit, forward)
    parts["own_work"], parts["batch_mates"], parts["padding"] = own, batch_mates, padding
    parts["contention"] = forward - own - batch_mates - padding
    # A cold start already includes the whole transit of its call.
    calls = [call for call in request.calls if not (parts["cold_start"] and call.stage == "model")]
    waited = min(parts["transit"], sum(_one_sided_ms(call, quickest) for call in calls))
    parts["replica_wait"] += waited
    parts["transit"] -= waited
    return parts


def _work(
    request: Request, runs: Mapping[Key, Run], fit: RunFit | None, forward_ms: float
) -> tuple[float, float, float]:
    """Split its forward passes into own work, batch_mates, padding; all own work if the runs or the fit are missing."""
    known = [runs[key] for key in request.runs if key in runs]
    if fit is None or not known or len(known) < len(request.runs):
        return forward_ms, 0.0, 0.0
    own_tokens = min(request.tokens, sum(run.tokens for run in known))
    own = fit.run_ms * len(known) + fit.token_ms * own_tokens
    batch_mates = fit.token_ms * (sum(run.tokens for run in known) - own_tokens)
    padding = fit.token_ms * sum(max(0, run.padded_tokens - run.tokens) for run in known)
    # Runs that were faster than the fit leave no contention, and each part is scaled down accordingly.
    scale = min(1.0, forward_ms / (own + batch_mates + padding)) if own + batch_mates + padding else 0.0
    return own * scale, batch_mates * scale, padding * scale


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


def _one_sided_ms(call: Call, quickest: Mapping[tuple[str, str, str], Call]) -> float:
    best = quickest[(call.stage, *call.between)]
    return max(0, (call.there_ns - best.there_ns) - (call.back_ns - best.back_ns)) / 1e6


def median(values: Sequence[float]) -> float:
    """The upper median; 0 if there are no values."""
    return sorted(values)[len(values) // 2] if values else 0.0

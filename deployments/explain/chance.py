"""How long requests wait for a device by chance, when nothing is wrong.

Requests that arrive at random sometimes arrive together. How long some wait for that reason follows from the rate at
which they arrive and what their runs cost, so it is computed: a replica with the measured rate, sizes and costs, whose
arrivals are random, serves whoever waits together, as the real one does. A device that is always busy is no sign of too
much work: the more wait, the larger its batches. Too much is what it could not do even in full batches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deployments.explain.requests.capture import Capture
from deployments.explain.requests.parts import fit_runs

_REQUESTS = 8000
_SEED = 7
_MAX_LOAD = 0.9
"""The share of what a device can do in full batches that may arrive for its waits to be chance."""
_SIZE, _WINDOWS = 32, 0.9


def wait_by_chance_ms(capture: Capture, share: float) -> float:
    """What this share of the requests wait by chance for a device and for their batch-mates, or more.

    That differs from window to window; this is what it is at most in nine of ten windows with as many requests. 0 where
    it cannot be known: without runs, and where more arrives than waits by chance are made of.
    """
    fit = fit_runs(capture.runs.values())
    begin, end = capture.survey.window_ns
    replicas = len(capture.busy_ns)
    requests = [request for request in capture.requests if not request.error and request.generation is None]
    tokens, weights = [request.tokens for request in requests], [capture.weight(request) for request in requests]
    if fit is None or not replicas or end <= begin or not tokens:
        return 0.0
    size = int(capture.settings.get("batching.max_batch_size", _SIZE))
    each_ms = (end - begin) / 1e6 * replicas / sum(weights)
    # What slows all runs (other processes, too few CPUs) lets requests wait longer for their turn; what they wait
    # because of it has causes of its own.
    expected_ms = sum(fit.ms(run.padded_tokens) for run in capture.runs.values())
    slower = max(1.0, sum(run.took_ns for run in capture.runs.values()) / 1e6 / max(1e-9, expected_ms))
    mean_tokens = sum(one * weight for one, weight in zip(tokens, weights, strict=True)) / sum(weights)
    if slower * (fit.run_ms / size + fit.token_ms * mean_tokens) > _MAX_LOAD * each_ms:
        return 0.0
    chance = random.Random(_SEED)
    arrivals, at = [], 0.0
    for one in chance.choices(tokens, weights, k=_REQUESTS):
        at += chance.expovariate(1 / each_ms)
        arrivals.append((at, one))
    waits = _served(arrivals, size, slower * fit.run_ms, slower * fit.token_ms)
    count = max(1, min(_REQUESTS, round(sum(weights) / replicas)))
    windows = [sorted(waits[begin : begin + count]) for begin in range(0, _REQUESTS - count + 1, count)]
    found = sorted(window[int((count - 1) * (1 - share))] for window in windows)
    return found[int(len(found) * _WINDOWS)] / slower


def _served(arrivals: Sequence[tuple[float, int]], size: int, run_ms: float, token_ms: float) -> list[float]:
    """The waits of requests, given as time and tokens: whoever is there when the device is free runs together."""
    waits, number, free_at = [], 0, 0.0
    while number < len(arrivals):
        begins = max(free_at, arrivals[number][0])
        batch = [arrivals[number]]
        while len(batch) < size and number + len(batch) < len(arrivals) and arrivals[number + len(batch)][0] <= begins:
            batch.append(arrivals[number + len(batch)])
        number += len(batch)
        took = run_ms + token_ms * sum(tokens for _, tokens in batch)
        waits += [begins - at + took - (run_ms + token_ms * tokens) for at, tokens in batch]
        free_at = begins + took
    return waits

"""How long requests wait when nothing is wrong: for a device by chance, and for a CPU as usual.

Requests that arrive at random sometimes arrive together. How long some wait for that reason follows from the rate at
which they arrive and what their runs cost, so it is computed: a replica with the measured rate, sizes and costs, whose
arrivals are random, serves whoever waits together, as the real one does. A device that is always busy is no sign of too
much work: the more wait, the larger its batches. Too much is what it could not do even in full batches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deployments.explain.fixes import cpus_used
from deployments.explain.periods import Judged, blocks_of
from deployments.explain.requests.capture import Capture
from deployments.explain.requests.parts import fit_runs
from deployments.explain.requests.request import window_of
from deployments.explain.traces.survey import Key
from deployments.explain.traces.weights import percentile

_REQUESTS = 8000
_SEED = 7
_MAX_LOAD = 0.9
"""The share of what a device can do in full batches that may arrive for its waits to be chance."""
_SIZE, _WINDOWS = 32, 0.9
_BLOCKS, _OF_A_BLOCK, _MUCH_MORE = 24, 3, 0.15


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


# --- waiting for a CPU -----------------------------------------------------------------------------------------------


def usually_starved(ordinary: Sequence[Judged]) -> float:
    """The share of their time that ordinary requests wait for a CPU: what the application's own processes make.

    By blocks of so many requests, of which it is the lower quartile, so that a shortage that lasts for most of them is
    not taken for usual. Single requests differ too much: whoever runs much competes with the application's other
    processes; and so does a rush of requests, whose shortage is the load's.
    """
    blocks = blocks_of(sorted(ordinary, key=lambda one: one.request.started_ns), _BLOCKS)
    shares = [
        sum(one.weight * one.parts["cpu_starved"] for one in block)
        / max(1e-9, sum(one.weight * sum(one.parts.values()) for one in block))
        for block in blocks
    ]
    return percentile(sorted((share, 1.0) for share in shares), 0.25)


def _blocks_of_time(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Those that began in each of equally long parts of the window, where there were some."""
    begin, end = window_of([one.request for one in judged])
    blocks: list[list[Judged]] = [[] for _ in range(_BLOCKS)]
    for one in judged:
        blocks[min(_BLOCKS - 1, (one.request.started_ns - begin) * _BLOCKS // max(1, end - begin))].append(one)
    return [block for block in blocks if len(block) >= _OF_A_BLOCK]


def while_others_had_the_cpus(answered: Sequence[Judged]) -> set[Key]:
    """Those of the blocks of time in which other processes used a seventh more of the CPUs than they mostly do."""
    blocks = _blocks_of_time(answered)
    used = [(block, cpus_used([one.request for one in block])) for block in blocks]
    known = [(block, of_all - own) for block, (own, of_all) in used if of_all]
    most = max((of_all for _, (_, of_all) in used), default=0.0)
    usual = percentile(sorted((others, 1.0) for _, others in known), 0.25)
    return {one.request.key for block, others in known if others >= usual + _MUCH_MORE * most for one in block}

"""What other settings, another rate or more replicas would do, and which settings keep a target at the least cost."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deployments.explain.counted import Counted
from deployments.explain.render.sample import as_document, percentiles
from deployments.explain.render.text import iso_time
from deployments.simulate.recording import REFUSED, Recording
from deployments.simulate.replay import Replayed, replay
from deployments.simulate.settings import changed, settings_of

_STAGES = ("validate", "tokenize", "replica_wait", "queue", "forward", "postprocess", "transit")
_SHOWN = ("p50", "p90", "p95", "p99")
MODEL_REPLICAS = "deployments.Model.num_replicas"
_SEARCHED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("batching.max_batch_size", (8, 16, 32, 64, 128)),
    ("batching.max_batch_tokens", (2048, 4096, 8192, 16384)),
    ("batching.max_run_ms", (100, 250, 500, 1000)),
    ("batching.max_wait_ms", (0, 5, 20)),
    ("batching.grouping_window", (1, 32, 128, 512)),
)
_MOST_SEARCHED = 10_000
"""Requests of one replay of a search: the last ones of the window."""
_MOST_REPLICAS = 16


@dataclass(frozen=True, slots=True)
class WhatIf:
    recording: Recording
    change: dict[str, Sequence[Any]]
    """The value of each key before and after."""
    rate: float
    replayed: Replayed
    """Without a change."""
    predicted: Replayed


def what_if(recording: Recording, changes: Mapping[str, Any], rate: float = 1.0) -> WhatIf:
    """Predict what these settings, by key, would have done. Raises ConfigError, naming the key."""
    before = settings_of(recording.settings, recording.replicas, {})
    after = settings_of(recording.settings, recording.replicas, changes)
    return WhatIf(
        recording,
        changed(recording.settings, recording.replicas, changes),
        rate,
        replay(recording, before),
        replay(recording, after, rate),
    )


def search(
    recording: Recording,
    target_p99_ms: float,
    rate: float = 1.0,
    on_try: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> WhatIf | None:
    """Look for the settings that keep p99 below the target and refuse nobody, at the least replica-seconds.

    A replica costs more than any setting of the queue: the least number of replicas that is enough is looked for first,
    then fewer of them with one other setting changed. Returns None if nothing does.
    """
    part = _last(recording, _MOST_SEARCHED)

    def p99(changes: Mapping[str, Any]) -> float:
        on_try(changes)
        done = replay(part, settings_of(part.settings, part.replicas, changes), rate)
        return percentiles(_latencies(done))["p99"] if done.answered and not done.refused else float("inf")

    def best(replicas: int) -> dict[str, Any] | None:
        each = [(p99(changes), number, changes) for number, changes in enumerate(_candidates(recording, replicas))]
        least, _, changes = min(each, default=(float("inf"), 0, {}))
        return changes if least <= target_p99_ms else None

    enough = (
        bisect_left(
            range(1, _MOST_REPLICAS), True, key=lambda replicas: p99({MODEL_REPLICAS: replicas}) <= target_p99_ms
        )
        + 1
    )
    found: dict[str, Any] | None = {MODEL_REPLICAS: enough}
    if enough == _MOST_REPLICAS and p99({MODEL_REPLICAS: enough}) > target_p99_ms:
        found = best(enough)
    while found is not None and found[MODEL_REPLICAS] > 1 and (cheaper := best(found[MODEL_REPLICAS] - 1)) is not None:
        found = cheaper
    return what_if(recording, found, rate) if found is not None else None


def _candidates(recording: Recording, replicas: int) -> Iterator[dict[str, Any]]:
    """So many replicas with one other setting changed."""
    for key, values in _SEARCHED:
        for value in values:
            if value != changed(recording.settings, recording.replicas, {key: value})[key][0]:
                yield {MODEL_REPLICAS: replicas, key: value}


def _last(recording: Recording, count: int) -> Recording:
    if len(recording.requests) <= count:
        return recording
    requests = recording.requests[-count:]
    return Recording(
        requests,
        [run for run in recording.runs if run.started_ns >= requests[0].at_ns] or recording.runs,
        recording.fit,
        recording.settings,
        recording.replicas,
        recording.start_s,
    )


# --- what is printed -------------------------------------------------------------------------------------------------


def _latencies(done: Replayed) -> list[float]:
    return sorted(outcome.latency_ns / 1e6 for _, outcome in done.answered)


def _percentiles(ascending: Sequence[float]) -> dict[str, float]:
    found = percentiles(ascending)
    return {name: found[name] for name in _SHOWN}


def document(found: WhatIf) -> dict[str, Any]:
    """The result as the public JSON document."""
    recording = found.recording
    begin, end = recording.window_ns
    change: dict[str, Sequence[Any]] = dict(found.change)
    if found.rate != 1:
        change["rate"] = [1.0, found.rate]
    replayed, predicted = (_stages(done) for done in (found.replayed, found.predicted))
    return {
        "schema": 1,
        "window": {"from": iso_time(begin), "to": iso_time(end)},
        "requests": len(recording.requests),
        "kept": recording.kept or len(recording.requests),
        "change": change,
        "measured": _percentiles(sorted(one.latency_ns / 1e6 for one in recording.answered)),
        "replayed": _percentiles(_latencies(found.replayed)),
        "predicted": _percentiles(_latencies(found.predicted)),
        "stages": [
            {"stage": stage, "replayed_ms": round(replayed[stage], 3), "predicted_ms": round(predicted[stage], 3)}
            for stage in _STAGES
        ],
        "refused": {
            "measured": sum(one.error in REFUSED for one in recording.requests),
            "predicted": found.predicted.refused,
        },
        "replica_seconds": {
            "measured": round(found.replayed.replica_seconds, 1),
            "predicted": round(found.predicted.replica_seconds, 1),
        },
    }


def _stages(done: Replayed) -> dict[str, float]:
    """The mean of each stage, in milliseconds; they add up to the mean latency."""
    if not done.answered:
        return dict.fromkeys(_STAGES, 0.0)
    means: dict[str, float] = {
        "validate": fmean(one.validate_ns for one, _ in done.answered),
        "tokenize": fmean(one.tokenize_ns for one, _ in done.answered),
        "replica_wait": fmean(outcome.replica_wait_ns for _, outcome in done.answered),
        "queue": fmean(outcome.queue_ns for _, outcome in done.answered),
        "forward": fmean(outcome.forward_ns for _, outcome in done.answered),
        "postprocess": fmean(one.postprocess_ns for one, _ in done.answered),
    }
    means["transit"] = fmean(outcome.latency_ns for _, outcome in done.answered) - sum(means.values())
    return {stage: means[stage] / 1e6 for stage in _STAGES}


def as_json(found: WhatIf, counted: Counted | None = None) -> str:
    return json.dumps({**document(found), **as_document(counted)}, indent=2)


def as_text(found: WhatIf) -> RenderableType:
    told, recording = document(found), found.recording
    lines: list[RenderableType] = [
        Text(f"{told['requests']} requests, {told['window']['from']} to {told['window']['to']}", style="bold")
    ]
    if recording.is_sample:
        sampled = f"estimated from the {told['kept']} whose traces were kept; the others are put at random between them"
        lines.append(Text(sampled))
    for key, (before, after) in told["change"].items():
        lines.append(Text(f"{key}: {'' if before is None else f'{before} -> '}{after}"))
    lines += [Text(), _table(told), Text()]
    refused, seconds = told["refused"], told["replica_seconds"]
    lines.append(Text(f"refused: {refused['measured']} -> {refused['predicted']} (measured, predicted)"))
    lines.append(Text(f"replica-seconds of the model: {seconds['measured']:.0f} -> {seconds['predicted']:.0f}"))
    lines.append(Text(_fidelity(told), style="dim"))
    return Group(*lines)


def _table(told: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("latency, ms")
    for heading in ("measured", "replayed", "predicted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in _SHOWN:
        table.add_row(name, *(f"{told[column][name]:.1f}" for column in ("measured", "replayed", "predicted")))
    for row in told["stages"]:
        table.add_row(
            f"  {row['stage'].replace('_', ' ')} (mean)", "", f"{row['replayed_ms']:.1f}", f"{row['predicted_ms']:.1f}"
        )
    return table


def _fidelity(told: Mapping[str, Any]) -> str:
    """How far the replay without a change is from what was measured."""
    off = [
        f"{name} by {told['replayed'][name] / told['measured'][name] - 1:+.0%}"
        for name in ("p50", "p99")
        if told["measured"][name]
    ]
    return f"fidelity: replayed without a change it differs in {', '.join(off)}; a prediction is not nearer than that"

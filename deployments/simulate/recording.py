"""What is known of the requests of a window: when they came, how large they were, and where their time went.

Every request is read, but only a few numbers of it are kept. Where only some were traced, each stands for as many like
it as its weight says. Of a request that never reached the model, its size is
that of another; what a client did wrong is left out. Times beside the model are taken as they were.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from deployments.explain.requests.capture import Run, facts_of, run_of
from deployments.explain.requests.parts import RunFit, fit_runs
from deployments.explain.requests.request import number, whole
from deployments.explain.traces.files import Source
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import NOT_OURS, Key, Survey, weighed
from deployments.telemetry import names

_DEFAULT_TIMEOUT_MS = 60_000.0
_NEEDED = {
    names.PREDICT,
    names.VALIDATE,
    names.PREPROCESS,
    names.HOP_MODEL,
    names.BATCHED_PREDICT,
    names.POSTPROCESS,
    names.BATCH_FORWARD,
    names.GENERATE,
    names.MODEL_LOAD,
    names.SCALING_DECISION,
}
_FEW_RUNS = 20
_SEED, _NEAR = 5, 10
"""Of what is drawn at random; from how many kept requests on either side."""
_NONE: Mapping[Key, float] = {}
REFUSED = ("queue_full", "deadline_passed")


class NotReplayable(Exception):
    """The traces do not have what a replay needs; the message says what is missing."""


class Recorded(NamedTuple):
    """One request. Times are nanoseconds; ``at_ns`` is Unix time."""

    at_ns: int
    latency_ns: int
    error: str
    inputs: int
    tokens: int
    chars: int
    timeout_ns: int
    tenant: str
    before_ns: int
    """Until it was ready to be sent to the model."""
    after_ns: int
    """After the model's reply, and what the call took on the way."""
    validate_ns: int
    tokenize_ns: int
    postprocess_ns: int
    replica_wait_ns: int
    queue_ns: int
    forward_ns: int


class _Kept(NamedTuple):
    request: Recorded
    weight: float
    """For how many requests it stands."""
    counter: str
    """The ingress and the model that numbered it."""
    number: int
    """0 if it has none."""


@dataclass(slots=True)
class Recording:
    requests: list[Recorded]
    """By arrival."""
    runs: list[Run]
    """By start time."""
    fit: RunFit
    settings: dict[str, Any]
    replicas: int
    """Model replicas that served."""
    start_s: float
    """How long a model replica takes to start; 0 if none did."""
    is_sample: bool = False
    """Whether some of the requests stand for others."""
    kept: int = 0
    """Those that were traced."""

    @property
    def window_ns(self) -> tuple[int, int]:
        return self.requests[0].at_ns, max(one.at_ns + one.latency_ns for one in self.requests)

    @property
    def answered(self) -> list[Recorded]:
        return [one for one in self.requests if not one.error]

    @property
    def lived_ns(self) -> int:
        """How much longer than its run a request's forward pass is, which ends when its result is delivered."""
        lived = [one.forward_ns for one in self.requests if one.forward_ns]
        took = [run.took_ns for run in self.runs for _ in range(run.size)]
        return max(0, round(median(lived) - median(took))) if lived and took else 0

    @property
    def handover_ns(self) -> int:
        """How long a device is idle between two runs although inputs wait; 0 if which follow each other is unknown."""
        if self.is_sample:
            return 0
        last: dict[str, Run] = {}
        gaps = []
        for run in self.runs:
            if (before := last.get(run.replica)) is not None and before.queue_behind:
                gaps.append(run.started_ns - before.started_ns - before.took_ns)
            last[run.replica] = run
        return max(0, round(median(gaps))) if gaps else 0


class _Wanted(Survey):
    """The spans of all requests, as far as they are needed."""

    def wants(self, name: str, trace_id: str) -> bool:  # noqa: ARG002
        return name in _NEEDED


def record(source: Source, since_ns: int = 0) -> Recording:
    """Read the requests that ended at ``since_ns`` or later. Raises NotReplayable."""
    roots, sample = weighed((root for root in source.roots(since_ns) if root.ended_ns >= since_ns), since_ns)
    if not roots:
        raise NotReplayable("there is no request in these traces")
    if sample.says_nothing:
        raise NotReplayable(
            f"the traces of {sample.kept} of {sample.counted} requests are here, and they do not say for how many they "
            "stand: what came beside them is not known"
        )
    wanted = _Wanted(since_ns=since_ns, known={root.key[0] for root in roots}, trace_ids_to_read=set())
    wanted.trace_ids_to_read = wanted.known
    wanted.window_ns = min(root.started_ns for root in roots), max(root.ended_ns for root in roots)
    found = recording_of(source.spans(wanted), {root.key: root.weight for root in roots}, since_ns)
    found.kept = sample.kept
    return found


def recording_of(spans: Iterable[Span], weights: Mapping[Key, float] = _NONE, since_ns: int = 0) -> Recording:
    """Collect what a replay needs of these requests, and for how many each stands. Raises NotReplayable."""
    roots: dict[Key, Span] = {}
    hops: dict[Key, Span] = {}
    served: dict[Key, Span] = {}
    tokenized: dict[str, int] = {}
    postprocessed: dict[str, int] = {}
    validated: dict[Key, int] = {}
    runs: dict[Key, Run] = {}
    facts: dict[str, tuple[int, dict[str, Any]]] = {}
    starts: list[float] = []
    for span in spans:
        if span.end_ns > facts.get(span.instance, (0,))[0]:
            known = facts[span.instance][1] if span.instance in facts else facts_of(span.resource)
            facts[span.instance] = span.end_ns, known
        match span.name:
            case names.PREDICT if span.end_ns >= since_ns:
                roots[span.key] = span
            case names.VALIDATE:
                validated[span.trace_id, span.parent_id] = span.end_ns - span.start_ns
            case names.PREPROCESS:
                tokenized[span.trace_id] = span.end_ns - span.start_ns
            case names.HOP_MODEL:
                # Of two attempts the one that was answered.
                if not span.failed or (span.trace_id, span.parent_id) not in hops:
                    hops[span.trace_id, span.parent_id] = span
            case names.BATCHED_PREDICT:
                served[span.trace_id, span.parent_id] = span
            case names.POSTPROCESS:
                postprocessed[span.trace_id] = span.end_ns - span.start_ns
            case names.BATCH_FORWARD:
                runs[span.key] = run_of(span)
            case names.GENERATE:
                raise NotReplayable("these are generations; what-if replays encoders only")
            case names.MODEL_LOAD:
                starts.append((span.end_ns - span.start_ns) / 1e9)
            case names.SCALING_DECISION:
                # With the start of its process, which the load does not have.
                starts.append(number(span, names.AI_AUTOSCALING_START_MS) / 1e3)
    settings: dict[str, Any] = {}
    for _, known in sorted(facts.values(), key=lambda pair: pair[0]):
        settings |= known
    timeout_ms = float(settings.get("limits.default_timeout_ms", _DEFAULT_TIMEOUT_MS))
    kept = []
    for key, root in roots.items():
        found = _recorded(root, hops.get(key), served, validated.get(key, 0), tokenized, postprocessed, timeout_ms)
        if found is not None:
            counter = f"{root.instance} {root.attributes.get(names.AI_MODEL_NAME, '')}"
            kept.append(_Kept(found, weights.get(key, 1.0), counter, whole(root, names.AI_REQUEST_NUMBER)))
    requests = sorted(_all_of(kept))
    ran = sorted((run for run in runs.values() if run.took_ns > 0 and not run.failed), key=lambda run: run.started_ns)
    fit = fit_runs(ran)
    if not any(not one.error for one in requests):
        raise NotReplayable("no request in these traces was answered")
    if fit is None or len(ran) < _FEW_RUNS:
        raise NotReplayable(f"what a run costs cannot be learned from {len(ran)} runs; {_FEW_RUNS} are needed")
    return Recording(
        list(_with_sizes(requests)),
        ran,
        fit,
        settings,
        replicas=len({run.replica for run in ran}),
        start_s=max(starts, default=0.0),
        is_sample=any(weight != 1 for weight in weights.values()),
    )


def _all_of(kept: Sequence[_Kept]) -> Iterator[Recorded]:
    """Yield the requests, and for those that were not traced others like the kept that stand for them.

    How many came between two that were kept is known by the numbers that their ingress gave them; when each did, and
    how large it was, is drawn at random. Without numbers, they are spread over the time that many kept ones take.
    """
    chance = random.Random(_SEED)
    stand_for = sorted(one for one in kept if one.weight > 1)
    yield from (one.request for one in kept if one.weight)
    if not stand_for:
        return
    times = [one.request.at_ns for one in stand_for]

    def like_those_at(at_ns: int) -> Recorded:
        near = bisect_left(times, at_ns)
        nearest = stand_for[max(0, near - _NEAR) : near + _NEAR]
        (found,) = chance.choices(nearest, [one.weight - 1 for one in nearest])
        return found.request._replace(at_ns=at_ns)

    if all(one.number for one in kept):
        by_counter: dict[str, list[_Kept]] = defaultdict(list)
        for one in sorted(kept, key=lambda one: one.number):
            by_counter[one.counter].append(one)
        for of_one in by_counter.values():
            for before, after in pairwise(of_one):
                for _ in range(after.number - before.number - 1):
                    yield like_those_at(round(chance.uniform(before.request.at_ns, after.request.at_ns)))
        return
    each_ns = (times[-1] - times[0]) / sum(one.weight for one in kept)
    for one in stand_for:
        around_ns = one.weight * each_ns * _NEAR
        for _ in range(int(one.weight - 1) + (chance.random() < one.weight % 1)):
            at_ns = one.request.at_ns + round(chance.uniform(-around_ns, around_ns))
            yield one.request._replace(at_ns=min(max(at_ns, times[0]), times[-1]))


def _recorded(
    root: Span,
    hop: Span | None,
    served: dict[Key, Span],
    validate_ns: int,
    tokenized: dict[str, int],
    postprocessed: dict[str, int],
    default_timeout_ms: float,
) -> Recorded | None:
    """None if the client is to blame, or if the spans of a request that was answered are missing."""
    error = str(root.attributes.get(names.ERROR_TYPE) or ("error" if root.failed else ""))
    if error in NOT_OURS:
        return None
    latency_ns = max(0, root.end_ns - root.start_ns)
    ran = served.get((root.trace_id, hop.span_id)) if hop is not None else None
    if ran is None and not error:
        return None
    before_ns = hop.start_ns - root.start_ns if hop is not None else min(latency_ns, validate_ns)
    waited_ns = round(number(hop, names.AI_HOP_WAIT_MS) * 1e6) if hop is not None else 0
    held_ns = max(0, ran.end_ns - ran.start_ns) if ran is not None else 0
    queue_ns = min(held_ns, round(number(ran, names.AI_BATCH_WAIT_TIME_MS) * 1e6)) if ran is not None else 0
    return Recorded(
        root.start_ns,
        latency_ns,
        error,
        inputs=max(1, whole(root, names.AI_INPUT_COUNT)),
        tokens=whole(root, names.GEN_AI_USAGE_INPUT_TOKENS),
        chars=whole(root, names.AI_INPUT_LENGTH),
        timeout_ns=round((number(root, names.AI_TIMEOUT_MS) or default_timeout_ms) * 1e6),
        tenant=str(root.attributes.get(names.AI_TENANT, "")),
        before_ns=max(0, before_ns),
        after_ns=max(0, latency_ns - before_ns - waited_ns - held_ns) if not error else 0,
        validate_ns=validate_ns,
        tokenize_ns=tokenized.get(root.trace_id, 0),
        postprocess_ns=postprocessed.get(root.trace_id, 0),
        replica_wait_ns=waited_ns,
        queue_ns=queue_ns,
        forward_ns=held_ns - queue_ns,
    )


def _with_sizes(requests: Sequence[Recorded]) -> Iterator[Recorded]:
    """Give those of which only the arrival is known the size, and the time beside the model, of the one before."""
    usual = next(one for one in requests if not one.error)
    for one in requests:
        if not one.error:
            usual = one
            yield one
        else:
            yield one._replace(
                inputs=usual.inputs if not one.tokens else one.inputs,
                tokens=one.tokens or usual.tokens,
                before_ns=one.before_ns or usual.before_ns,
                after_ns=usual.after_ns,
            )

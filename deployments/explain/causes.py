"""The causes that a slow request can have: which parts of its latency speak for each, and what helps.

A fix names the setting as it stands in serve_config.yaml, its value where the processes said it, and another to try.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.explain.requests.capture import BINS, Capture, bin_ns
from deployments.explain.requests.parts import median
from deployments.explain.requests.request import Request
from deployments.explain.requests.scaling import orders_during

_ALL_AT_ONCE = 4000
"""``max_ongoing_requests`` that leaves the waiting to the model's own queue."""
_GROUPING = 128
_COMFORT = 0.7
"""How busy a device may be before those who come wait long for those who came."""


@dataclass(frozen=True, slots=True)
class Cause:
    """``parts``: what is added up for it. ``serves_nobody``: its ordinary amount is nothing."""

    name: str
    parts: tuple[str, ...]
    serves_nobody: bool
    what: str
    """What the time went to, after "3 of 5 slow requests spent"."""
    fix: Callable[[Capture, Sequence[Request]], str]
    """From all that was read, and the requests concerned."""
    stage: str = "model"
    """Whose replica matters."""
    is_stated: bool = False
    """Whether the trace itself states it, so that one request is enough to say so."""
    is_for_want_of_replicas: bool = False
    """Whether more replicas of ``stage``, sooner, would have helped: then it is said what the autoscaling did."""


def _warm(capture: Capture, _: Sequence[Request]) -> str:
    key = "deployments.Model.autoscaling_config.min_replicas"
    current = capture.settings.get(key)
    if current is None and "deployments.Model.num_replicas" in capture.settings:
        return f"a replica (re)started under traffic: see its log; keep another beside it ({_more(capture, 'Model')})"
    return f"keep replicas warm: {_change(key, current, 1 + (current or 0))}"


def _more_model_replicas(capture: Capture, slow: Sequence[Request]) -> str:
    replicas = max(1, len(capture.busy_ns))
    begin, width = capture.survey.window_ns[0], bin_ns(capture.survey.window_ns)
    # While they were there, not before and after.
    bins = {min(BINS - 1, (request.started_ns - begin) // width) for request in slow}
    busy_ns = sum(busy[number] for busy in capture.busy_ns.values() for number in bins)
    busy = busy_ns / (len(bins) * width * replicas)
    more = _more(capture, "Model", max(replicas + 1, math.ceil(replicas * busy / _COMFORT)), slow)
    return (
        f"the model's devices were busy for {busy:.0%} of that time: more model replicas ({more}), or runs that cost "
        "less (a GPU, model.dtype, model.quantization)"
    )


def _less_filling(_: Capture, slow: Sequence[Request]) -> str:
    current = max(request.max_wait_ms for request in slow)
    return f"{_change('batching.max_wait_ms', current, 0)}; batches still grow while the device is busy"


def _shorter_inputs(capture: Capture, slow: Sequence[Request]) -> str:
    tokens = median([request.tokens for request in slow])
    return (
        f"the slow requests had {tokens:.0f} tokens (median): refuse longer ones "
        f"({_input_limit(capture, slow)}), cut them (model.max_length), or make runs cost less (a GPU, model.dtype)"
    )


def _tokenizer(capture: Capture, slow: Sequence[Request]) -> str:
    chars = max(request.chars for request in slow)
    return (
        f"inputs of up to {chars} characters: {_input_limit(capture, slow)}, or more tokenizer replicas "
        f"({_more(capture, 'Tokenizer')})"
    )


def after_failures(capture: Capture, kind: str) -> str:
    """What helps against the most frequent kind of failure (``error.type``)."""
    if kind == "queue_full":
        most = capture.settings.get("batching.max_queue")
        queue = _change("batching.max_queue", most, 2 * (most or 1024))
        return (
            f"more came than the model could run: more model replicas ({_more(capture, 'Model')}), or, for bursts, a "
            f"longer queue ({queue})"
        )
    if kind == "deadline_passed":
        return (
            f"deadlines passed before the answer: more model replicas ({_more(capture, 'Model')}), or longer deadlines"
        )
    if kind == "no_replica_ready":
        return _warm(capture, ())
    if kind == "replica_died":
        return (
            "a replica's process ended: see its log and the kernel's (out of memory?), and keep another beside it "
            f"({_more(capture, 'Model')})"
        )
    return "read one of these traces, and the replica's log at its time"


def _input_limit(capture: Capture, slow: Sequence[Request]) -> str:
    """The round limit that just refuses these and leaves room for twice what is usual, where there is one."""
    keys = {request.key for request in slow}
    others = sorted(request.chars for request in capture.requests if request.key not in keys)
    usual = others[len(others) * 95 // 100] if others else 0
    least = min(request.chars for request in slow)
    magnitude = 10 ** math.floor(math.log10(max(1, least - 1)))
    wanted = max(step * magnitude for step in (1, 2, 5) if step * magnitude < max(2, least))
    key = "limits.max_input_chars"
    return _change(key, capture.settings.get(key), wanted) if wanted >= 2 * usual else f"{key} below that"


def _replica_that_waited(capture: Capture, slow: Sequence[Request]) -> str:
    stages = Counter(
        max(request.calls, key=lambda c: c.there_ns - c.back_ns).stage for request in slow if request.calls
    )
    name = stages.most_common(1)[0][0].capitalize() if stages else "Model"
    key = f"deployments.{name}.max_ongoing_requests"
    current = capture.settings.get(key)
    least = f"deployments.{name}.autoscaling_config.min_replicas"
    if capture.settings.get(least) == 0:
        return f"keep a replica of the deployment {name}: {_change(least, 0, 1)}"
    more = _more(capture, name, slow=slow)
    if isinstance(current, int | float) and current < _ALL_AT_ONCE:
        return f"{_change(key, current, _ALL_AT_ONCE)}, or more replicas ({more})"
    return f"more replicas of the deployment {name} ({more})"


def _less_padding(capture: Capture, _: Sequence[Request]) -> str:
    window = capture.settings.get("batching.grouping_window")
    if window is None or window < _GROUPING:
        return f"keep short and long inputs apart: {_change('batching.grouping_window', window, _GROUPING)}"
    tokens = capture.settings.get("batching.max_batch_tokens")
    return f"smaller batches: {_change('batching.max_batch_tokens', tokens, (tokens or 8192) // 2)}"


def _more_postprocessors(capture: Capture, _: Sequence[Request]) -> str:
    return f"more replicas ({_more(capture, 'Postprocessor')}), or smaller answers (top_k, dimensions)"


def _more(capture: Capture, deployment: str, wanted: int = 0, slow: Sequence[Request] = ()) -> str:
    """The setting that gives more replicas: one more, or as many as are wanted.

    Where they are scaled and it came late for these requests, the one that has them there before.
    """
    path = f"deployments.{deployment}"
    most = capture.settings.get(f"{path}.autoscaling_config.max_replicas")
    orders = orders_during(capture.scalings, slow, deployment, capture.loads)
    ordered = [one.ordered for one in orders if one.ordered > one.replicas]
    if ordered:
        key = f"{path}.autoscaling_config.min_replicas"
        return _change(key, capture.settings.get(key), max(ordered))
    if most is not None:
        return _change(f"{path}.autoscaling_config.max_replicas", most, max(most + 1, wanted))
    stage = deployment.lower()
    seen = len({request.replicas[stage] for request in capture.requests if stage in request.replicas})
    current = capture.settings.get(f"{path}.num_replicas", seen or 1)
    return _change(f"{path}.num_replicas", current, max(current + 1, wanted))


def _change(key: str, current: Any, wanted: Any) -> str:
    """``batching.max_batch_tokens: 8192 -> 4096``."""
    before = f"{current:g}" if isinstance(current, float) else current
    return f"{key}: {before} -> {wanted}" if current is not None else f"{key}: {wanted}"


def _advice(text: str) -> Callable[[Capture, Sequence[Request]], str]:
    return lambda *_: text


CAUSES = (
    Cause(
        "cold_start",
        ("cold_start", "model_load"),
        True,
        "waiting for a model replica to start and load",
        _warm,
        is_stated=True,
        is_for_want_of_replicas=True,
    ),
    Cause("replica_queue", ("replica_wait",), True, "waiting for a replica to take the call", _replica_that_waited),
    Cause(
        "device_queue",
        ("device_busy", "company"),
        True,
        "waiting behind a busy device, and for the others of a batch",
        _more_model_replicas,
        is_for_want_of_replicas=True,
    ),
    Cause("batch_fill", ("batch_fill",), True, "waiting for a batch to fill while the device was idle", _less_filling),
    Cause("tokenization", ("tokenization",), False, "in the tokenizer", _tokenizer, "tokenizer"),
    Cause("long_input", ("own_work",), False, "running inputs longer than usual", _shorter_inputs),
    Cause(
        "padding",
        ("padding",),
        True,
        "on the padding of longer neighbours, in their own runs or in those they waited for",
        _less_padding,
    ),
    Cause(
        "device_contention",
        ("contention",),
        True,
        "in runs that took longer than the same work usually does",
        _advice(
            "something else used the device: look for other processes on its GPU or CPUs, and give the deployment "
            "Model CPUs or a GPU of its own (num_cpus, num_gpus)"
        ),
    ),
    Cause("postprocessing", ("postprocessing",), False, "in the postprocessor", _more_postprocessors, "postprocessor"),
    Cause(
        "transit",
        ("transit", "response"),
        False,
        "between the actors",
        _advice(
            "the network between the hosts, or processes too busy to pass calls on: start with `slowlens serve`, give "
            "the stages CPUs (num_cpus), keep them on one host"
        ),
        "ingress",
    ),
    Cause(
        "slow_upload",
        ("validation",),
        False,
        "reading the request",
        _advice("the client sent its body slowly: look at its network, or at what stands between it and the ingress"),
        "ingress",
    ),
)

"""The causes that a slow request can have: which parts of its latency speak for each, and what helps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.explain.capture import Capture, Request, window_of


@dataclass(frozen=True, slots=True)
class Cause:
    """``parts``: what is added up for it. ``serves_nobody``: its ordinary amount is nothing."""

    name: str
    parts: tuple[str, ...]
    serves_nobody: bool
    what: str
    """What the time went to, after "3 of 5 slow requests spent"."""
    fix: Callable[[Capture, Sequence[Request]], str]
    is_stated: bool = False
    """Whether the trace itself states it, so that one request is enough to say so."""


def _more_model_replicas(capture: Capture, _: Sequence[Request]) -> str:
    replicas = len({request.model_replica for request in capture.requests if request.model_replica}) or 1
    begun, ended = window_of(capture.requests)
    busy = sum(run.took_ns for run in capture.runs.values()) / max(1, ended - begun) / replicas
    wanted = max(replicas + 1, math.ceil(replicas * busy / 0.7))
    return (
        f"the model's devices were busy {busy:.0%} of the time: more model replicas (deployment Model, num_replicas: "
        f"{replicas} -> {wanted}, or max_replicas of its autoscaling_config), or runs that cost less (a GPU, "
        "model.dtype, model.quantization)"
    )


def _less_filling(_: Capture, slow: Sequence[Request]) -> str:
    current = f"{max(request.max_wait_ms for request in slow):g}"
    return f"batching.max_wait_ms: {current} -> 0; batches still grow while the device is busy"


def _shorter_inputs(_: Capture, slow: Sequence[Request]) -> str:
    tokens = sorted(request.tokens for request in slow)
    return (
        f"the slow requests had {tokens[len(tokens) // 2]} tokens (median): refuse or cut longer ones "
        "(limits.max_input_chars, model.max_length), or make runs cost less (a GPU, model.dtype)"
    )


def _tokenizer(_: Capture, slow: Sequence[Request]) -> str:
    chars = max(request.chars for request in slow)
    return (
        f"inputs of up to {chars} characters: limits.max_input_chars below that, or more tokenizer replicas "
        "(deployment Tokenizer, num_replicas)"
    )


def _replica_that_waited(_: Capture, slow: Sequence[Request]) -> str:
    stages = Counter(
        max(request.calls, key=lambda c: c.there_ns - c.back_ns).stage for request in slow if request.calls
    )
    stage = stages.most_common(1)[0][0].capitalize() if stages else "Model"
    return f"more replicas of the deployment {stage} (num_replicas), or a higher max_ongoing_requests of it"


def _advice(text: str) -> Callable[[Capture, Sequence[Request]], str]:
    return lambda *_: text


CAUSES = (
    Cause(
        "cold_start",
        ("cold_start", "model_load"),
        True,
        "waiting for a model replica to start and load",
        _advice("keep a replica warm: min_replicas: 0 -> 1 in the autoscaling_config of the deployment Model"),
        is_stated=True,
    ),
    Cause("replica_queue", ("replica_wait",), True, "waiting for a replica to take the call", _replica_that_waited),
    Cause(
        "device_queue",
        ("device_busy", "company"),
        True,
        "waiting behind a busy device, and for the others of a batch",
        _more_model_replicas,
    ),
    Cause("batch_fill", ("batch_fill",), True, "waiting for a batch to fill while the device was idle", _less_filling),
    Cause("tokenization", ("tokenization",), False, "in the tokenizer", _tokenizer),
    Cause("long_input", ("own_work",), False, "running inputs longer than usual", _shorter_inputs),
    Cause(
        "padding",
        ("padding",),
        True,
        "computing the padding of longer neighbours",
        _advice(
            "keep short and long inputs apart: batching.grouping_window (128 by default; 1 is order of arrival), or a "
            "lower batching.max_batch_tokens"
        ),
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
    Cause(
        "postprocessing",
        ("postprocessing",),
        False,
        "in the postprocessor",
        _advice("more replicas of the deployment Postprocessor (num_replicas), or smaller answers (top_k, dimensions)"),
    ),
    Cause(
        "transit",
        ("transit", "response"),
        False,
        "between the actors",
        _advice(
            "the network between the hosts, or processes too busy to pass calls on: start with `slowlens serve`, give "
            "the stages CPUs (num_cpus), keep them on one host"
        ),
    ),
    Cause(
        "slow_upload",
        ("validation",),
        False,
        "reading the request",
        _advice("the client sent its body slowly: look at its network, or at what stands between it and the ingress"),
    ),
)

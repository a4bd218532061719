"""The possible causes of a slow request: which latency parts indicate each one, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.explain import fixes
from deployments.explain.fixes import FixFor, advice


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause.

    Attributes:
        parts: the latency parts summed for this cause.
        baseline_is_zero: whether its ordinary amount is zero, as for all waiting.
        what: where the time went; follows "3 of 5 slow requests spent".
        fix: builds the suggested fix.
        stage: the stage whose replica matters.
        is_stated: whether the trace itself states it, so that one request is enough evidence.
        is_for_want_of_replicas: whether having more replicas of ``stage`` sooner would have helped; if so, the finding
            says what autoscaling did.
    """

    name: str
    parts: tuple[str, ...]
    baseline_is_zero: bool
    what: str
    fix: FixFor
    stage: str = "model"
    is_stated: bool = False
    is_for_want_of_replicas: bool = False


CAUSES = (
    Cause(
        "cold_start",
        ("cold_start",),
        True,
        "waiting for a model replica to start and load",
        fixes.warm_replicas,
        is_stated=True,
        is_for_want_of_replicas=True,
    ),
    Cause("replica_queue", ("replica_wait",), True, "waiting for a replica to take the call", fixes.replicas_for_calls),
    Cause(
        "device_queue",
        ("device_busy", "batch_mates"),
        True,
        "waiting behind a busy device, and for batch-mates",
        fixes.more_model_replicas,
        is_for_want_of_replicas=True,
    ),
    Cause(
        "batch_fill",
        ("batch_fill",),
        True,
        "waiting for a batch to fill while the device was idle",
        fixes.shorter_fill_wait,
    ),
    Cause("tokenization", ("tokenization",), False, "in the tokenizer", fixes.less_tokenization, "tokenizer"),
    Cause("long_input", ("own_work",), False, "running inputs longer than usual", fixes.shorter_inputs),
    Cause(
        "padding",
        ("padding",),
        True,
        "on padding to longer inputs, in their own runs or in runs they waited for",
        fixes.less_padding,
    ),
    Cause(
        "device_contention",
        ("contention",),
        True,
        "in runs that took longer than the same work usually takes",
        advice(
            "something else used the device: look for other processes on its GPU or CPUs, and give the Model "
            "deployment its own CPUs or GPU (num_cpus, num_gpus)"
        ),
    ),
    Cause(
        "postprocessing", ("postprocessing",), False, "in the postprocessor", fixes.more_postprocessors, "postprocessor"
    ),
    Cause(
        "transit",
        ("transit", "response"),
        False,
        "between the actors",
        advice(
            "a slow network between hosts, or processes too busy to forward calls: start with `slowlens serve`, "
            "reserve CPUs for the stages (num_cpus), keep them on one host"
        ),
        "ingress",
    ),
    Cause(
        "slow_upload",
        ("validation",),
        False,
        "reading the request",
        advice("the client sent its body slowly: check its network, or whatever is between it and the ingress"),
        "ingress",
    ),
)

"""The causes that a slow request can have: which parts of its latency speak for each, and what helps."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.explain import fixes
from deployments.explain.fixes import FixFor, advice


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause.

    Attributes:
        parts: of the latency, added up for it.
        baseline_is_zero: whether its ordinary amount is nothing, as for all waiting.
        what: what the time went to, after "3 of 5 slow requests spent".
        fix: what helps.
        stage: whose replica matters.
        is_stated: whether the trace itself states it, so that one request is enough evidence.
        is_for_want_of_replicas: whether more replicas of ``stage``, sooner, would have helped; then the finding says
            what the autoscaling did.
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
        "waiting behind a busy device, and for the others of a batch",
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
        "on the padding of longer neighbours, in their own runs or in those they waited for",
        fixes.less_padding,
    ),
    Cause(
        "device_contention",
        ("contention",),
        True,
        "in runs that took longer than the same work usually does",
        advice(
            "something else used the device: look for other processes on its GPU or CPUs, and give the deployment "
            "Model CPUs or a GPU of its own (num_cpus, num_gpus)"
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
        advice("the client sent its body slowly: look at its network, or at what stands between it and the ingress"),
        "ingress",
    ),
)

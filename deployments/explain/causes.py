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
        least_of_useful: the least that a request must have lost to it, in times of what it takes without any waiting.
        behind: the part that is time lost behind others; the finding says how many lost most of it there.
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
    behind: str = ""
    least_of_useful: float = 1.5


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
    Cause(
        "long_input",
        ("own_work", "others_work"),
        False,
        "on longer inputs, or more of them, than usual: their own, or those that they waited behind or ran with",
        fixes.shorter_inputs,
        behind="others_work",
    ),
    Cause(
        "padding",
        ("padding",),
        True,
        "on padding to longer inputs, in their own runs or in runs they waited for",
        fixes.less_padding,
    ),
    Cause(
        "long_prompt",
        ("own_prefill",),
        False,
        "computing their own prompts, longer than usual",
        advice("send shorter prompts, or begin them alike: what two prompts have in common is computed once"),
    ),
    Cause(
        "prefill_interference",
        ("others_prefill",),
        True,
        "in steps that computed the prompts of others",
        fixes.smaller_steps,
    ),
    Cause(
        "decode_batch",
        ("decode_neighbours",),
        False,
        "in steps that were longer for the sequences that decoded beside them",
        fixes.fewer_neighbours,
        is_for_want_of_replicas=True,
    ),
    Cause(
        "kv_cache_full",
        ("cache_wait", "preempted"),
        True,
        "waiting for room in the KV cache, or computing again what had lost its place there",
        fixes.larger_cache,
        is_for_want_of_replicas=True,
    ),
    Cause(
        "long_output",
        ("decode",),
        False,
        "generating answers longer than usual",
        advice("limit max_completion_tokens, or set stop strings"),
    ),
    Cause(
        "slow_reader",
        ("slow_reader",),
        True,
        "sending answers that were complete to readers that took them slowly",
        advice("the client read its answer slowly: check its network, and what it does with each chunk"),
        "ingress",
        is_stated=True,
    ),
    Cause(
        "device_contention",
        ("contention",),
        True,
        "in runs that took longer than the same work usually takes",
        fixes.device_of_its_own,
    ),
    Cause(
        "cpu_starvation",
        ("cpu_starved",),
        True,
        "waiting for a CPU: threads of the application could run and did not",
        fixes.more_cpu,
        least_of_useful=3.0,
    ),
    Cause(
        "postprocessing", ("postprocessing",), False, "in the postprocessor", fixes.more_postprocessors, "postprocessor"
    ),
    Cause(
        "errors_retries",
        ("lost_attempt",),
        True,
        "on replicas that died before they replied, until the call was sent to another",
        fixes.living_replicas,
        is_stated=True,
    ),
    Cause(
        "transit",
        ("transit", "response", "front"),
        False,
        "between the actors, or before the ingress",
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
        # Serve's front takes some milliseconds to hand over a body, and at times many.
        least_of_useful=3.0,
    ),
)

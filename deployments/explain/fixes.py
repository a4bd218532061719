"""Fixes for the causes, as data: the settings to change, with their current and proposed values.

A fix includes the text around its changes; ``render`` formats each change.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deployments.explain.requests.capture import BINS, Capture, bin_ns
from deployments.explain.requests.parts import median, one_sided_ms, sizes_of
from deployments.explain.requests.request import Request, quickest_of
from deployments.explain.requests.scaling import held_up, longest_load, orders_during
from deployments.telemetry import names

_ALL_AT_ONCE = 4000
"""``max_ongoing_requests`` high enough that requests wait in the model's own queue."""
_GROUPING = 128
_MUCH_STARVED = 0.4
"""Share of their time in which requests waited for a CPU, from which on there are too few."""
_COMFORT = 0.7
"""How busy a device may be before requests wait long behind earlier ones."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a setting, named as in serve_config.yaml."""

    key: str
    current: Any
    """None if no process reported it."""
    proposed: Any


class Fix:
    """Text and changes, in reading order.

    Args:
        is_predictable: whether what a replay predicts of the changes would come true.
    """

    def __init__(self, *pieces: str | Change, is_predictable: bool = True) -> None:
        self.pieces, self.is_predictable = pieces, is_predictable

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, Change))


FixFor = Callable[[Capture, Sequence[Request]], Fix]
"""Builds a fix from the capture and the affected requests."""


def advice(text: str) -> FixFor:
    """Return a fix that does not depend on the capture."""
    return lambda *_: Fix(text)


def warm_replicas(capture: Capture, slow: Sequence[Request]) -> Fix:
    key = "deployments.Model.autoscaling_config.min_replicas"
    current = capture.settings.get(key)
    if current is None and "deployments.Model.num_replicas" in capture.settings:
        another = more_replicas(capture, "Model")
        return Fix("a replica (re)started under traffic: check its log, and run one more (", another, ")")
    load = longest_load(slow, capture.loads)
    is_read_slowly = load is not None and held_up(load, names.AI_IO_PRESSURE_MS)
    faster = "; read the weights from a faster disk, or put them into the image" if is_read_slowly else ""
    return Fix("keep replicas warm: ", Change(key, current, 1 + (current or 0)), faster)


def more_model_replicas(capture: Capture, slow: Sequence[Request]) -> Fix:
    replicas = max(1, len(capture.busy_ns))
    begin, width = capture.survey.window_ns[0], bin_ns(capture.survey.window_ns)
    # Only the bins in which the slow requests arrived.
    bins = {min(BINS - 1, (request.started_ns - begin) // width) for request in slow}
    busy_ns = sum(busy[number] for busy in capture.busy_ns.values() for number in bins)
    busy = busy_ns / (len(bins) * width * replicas)
    more = more_replicas(capture, "Model", max(replicas + 1, math.ceil(replicas * busy / _COMFORT)), slow)
    return Fix(
        f"the model's devices were busy {busy:.0%} of that time: add model replicas (",
        more,
        f"), or make runs cheaper (a GPU, model.dtype, model.quantization){(short := _short_of_cpus(slow))}",
        # A replay knows the model's own threads only.
        is_predictable=not short,
    )


def shorter_fill_wait(_: Capture, slow: Sequence[Request]) -> Fix:
    current = max(request.max_wait_ms for request in slow)
    return Fix(Change("batching.max_wait_ms", current, 0), "; batches still grow while the device is busy")


def shorter_inputs(capture: Capture, slow: Sequence[Request]) -> Fix:
    sizes = sizes_of(capture)
    # Those who waited behind a large request may be small themselves.
    large = [request for request in capture.requests if request.tokens >= sizes.large] or slow
    tokens, inputs = median([one.tokens for one in large]), median([one.inputs for one in large])
    usual = median([one.inputs for one in capture.requests], [capture.weight(one) for one in capture.requests])
    if inputs > usual:
        return Fix(
            f"the large requests have {inputs:.0f} inputs and {tokens:.0f} tokens (medians; usual are {usual:.0f} and "
            f"{sizes.usual:.0f}): allow fewer inputs in a request (",
            Change("limits.max_inputs", capture.settings.get("limits.max_inputs"), max(1, round(inputs / 2))),
            "), send them to replicas of their own, or make runs cheaper (a GPU, model.dtype)",
        )
    return Fix(
        f"the long inputs have {tokens:.0f} tokens (median; usual are {sizes.usual:.0f}): reject them (",
        _input_limit(capture, large),
        "), truncate them (model.max_length), or make runs cheaper (a GPU, model.dtype)",
    )


def less_tokenization(capture: Capture, slow: Sequence[Request]) -> Fix:
    chars = max(request.chars for request in slow)
    return Fix(
        f"inputs of up to {chars} characters: ",
        _input_limit(capture, slow),
        ", or add tokenizer replicas (",
        more_replicas(capture, "Tokenizer"),
        ")",
    )


def living_replicas(capture: Capture, _: Sequence[Request]) -> Fix:
    return Fix(
        "a replica's process died: check its log and the kernel log (out of memory?), and run one more (",
        more_replicas(capture, "Model"),
        ")",
    )


def after_failures(capture: Capture, kind: str) -> Fix:
    """Return the fix for the most frequent kind of failure (``error.type``)."""
    if kind == "queue_full":
        most = capture.settings.get("batching.max_queue")
        return Fix(
            "more requests arrived than the model could run: add model replicas (",
            more_replicas(capture, "Model"),
            "), or, for bursts, allow a longer queue (",
            Change("batching.max_queue", most, 2 * (most or 1024)),
            ")",
        )
    if kind == "deadline_passed":
        return Fix(
            "deadlines passed before the response: add model replicas (",
            more_replicas(capture, "Model"),
            "), or set longer deadlines",
        )
    if kind == "no_replica_ready":
        return warm_replicas(capture, ())
    if kind == "replica_died":
        return living_replicas(capture, ())
    return Fix("check one of these traces, and the replica's log at that time")


def _input_limit(capture: Capture, slow: Sequence[Request]) -> Change | str:
    """Return the round limit that just rejects these and leaves room for twice the usual length, if there is one."""
    keys = {request.key for request in slow}
    others = sorted(request.chars for request in capture.requests if request.key not in keys)
    usual = others[len(others) * 95 // 100] if others else 0
    least = min(request.chars for request in slow)
    magnitude = 10 ** math.floor(math.log10(max(1, least - 1)))
    wanted = max(step * magnitude for step in (1, 2, 5) if step * magnitude < max(2, least))
    key = "limits.max_input_chars"
    return Change(key, capture.settings.get(key), wanted) if wanted >= 2 * usual else f"set {key} below that"


def replicas_for_calls(capture: Capture, slow: Sequence[Request]) -> Fix:
    quickest = quickest_of(call for request in capture.requests for call in request.calls)
    stages = Counter(
        max(request.calls, key=lambda call: call.waited_ns / 1e6 + one_sided_ms(call, quickest)).stage
        for request in slow
        if request.calls
    )
    name = stages.most_common(1)[0][0].capitalize() if stages else "Model"
    key = f"deployments.{name}.max_ongoing_requests"
    current = capture.settings.get(key)
    least = f"deployments.{name}.autoscaling_config.min_replicas"
    if capture.settings.get(least) == 0:
        return Fix(f"keep a replica of the {name} deployment running: ", Change(least, 0, 1))
    if _mostly(slow, names.AI_GC_PAUSE_MS):
        held = Counter(one.hindered[names.AI_GC_PAUSE_MS][0] for one in slow if names.AI_GC_PAUSE_MS in one.hindered)
        return Fix(
            f"collections of garbage stop the {held.most_common(1)[0][0]}: let its processes hold fewer objects, or "
            "call gc.freeze() when they hold them"
        )
    more = more_replicas(capture, name, slow=slow)
    if isinstance(current, int | float) and current < _ALL_AT_ONCE:
        return Fix(Change(key, current, _ALL_AT_ONCE), ", or add replicas (", more, ")")
    short = _short_of_cpus(slow)
    return Fix(f"add replicas of the {name} deployment (", more, f"){short}", is_predictable=not short)


def less_padding(capture: Capture, _: Sequence[Request]) -> Fix:
    window = capture.settings.get("batching.grouping_window")
    if window is None or window < _GROUPING:
        return Fix("keep short and long inputs apart: ", Change("batching.grouping_window", window, _GROUPING))
    tokens = capture.settings.get("batching.max_batch_tokens")
    return Fix("smaller batches: ", Change("batching.max_batch_tokens", tokens, (tokens or 8192) // 2))


def smaller_steps(capture: Capture, _: Sequence[Request]) -> Fix:
    key = "generation.max_step_ms"
    current = capture.settings.get(key)
    return Fix("compute prompts in smaller chunks: ", Change(key, current, max(1, round((current or 250) / 2))))


def fewer_neighbours(capture: Capture, slow: Sequence[Request]) -> Fix:
    key = "generation.max_sequences"
    current = capture.settings.get(key)
    more = more_replicas(capture, "Model", slow=slow)
    return Fix(
        "add model replicas (", more, "), or generate fewer at once: ", Change(key, current, (current or 32) // 2)
    )


def larger_cache(capture: Capture, slow: Sequence[Request]) -> Fix:
    key = "generation.kv_cache_tokens"
    current = capture.settings.get(key)
    larger = Change(key, current, 2 * current) if current else f"raise {key}"
    more = more_replicas(capture, "Model", slow=slow)
    return Fix(
        larger,
        ", reserve less of it for output that does not come (generation.kv_reserve, max_tokens), or add "
        "model replicas (",
        more,
        ")",
    )


_STOLEN = (
    "the hypervisor gives the CPUs to other machines (ai.cpu.steal_ratio): take a machine whose CPUs are its own, and "
    "not one that has used up its credit"
)
_LIMITED = (
    "a CPU limit of the container is reached (ai.cpu.throttled_ratio): raise or remove it (resources.limits of its "
    "pod), or use less CPU in it (fewer replicas in one pod, model.threads)"
)


def _cpus_withheld(slow: Sequence[Request]) -> Fix | None:
    """What to do if neither the application nor other processes had the CPUs."""
    if _mostly(slow, names.AI_CPU_THROTTLED_MS):
        return Fix(_LIMITED)
    return Fix(_STOLEN) if _mostly(slow, names.AI_CPU_STEAL_MS) else None


def device_of_its_own(_: Capture, slow: Sequence[Request]) -> Fix:
    if (withheld := _cpus_withheld(slow)) is not None:
        return withheld
    if _mostly(slow, names.AI_MEMORY_PRESSURE_MS):
        return Fix(
            "the container is short of memory (ai.pressure.ratio): give it more (resources.limits of its pod), or run "
            "fewer replicas in it"
        )
    return Fix(
        "something else used the device: look for other processes on its GPU or CPUs, and give the Model deployment "
        "its own CPUs or GPU (num_cpus, num_gpus)"
    )


def _mostly(slow: Sequence[Request], hindrance: str) -> bool:
    """Whether half of them were hindered so, for a tenth of their time at least."""
    hit = [one for one in slow if hindrance in one.hindered and one.hindered[hindrance][1] >= one.latency_ns / 1e7]
    return bool(slow) and 2 * len(hit) >= len(slow)


def more_cpu(_: Capture, slow: Sequence[Request]) -> Fix:
    if (withheld := _cpus_withheld(slow)) is not None:
        return withheld
    own, of_all = cpus_used(slow)
    if own > of_all / 2:
        return Fix(
            f"the application itself uses {own:.1f} of the {of_all:.1f} CPUs in use: give it more of them, or start "
            "fewer replicas and threads on a host (model.threads)"
        )
    others = f"other processes use {of_all - own:.1f} of the {of_all:.1f} CPUs in use" if of_all else ""
    return Fix(
        f"{others or 'other processes use the CPUs'}: see what else runs on the host (ai.cpu.run_delay_ratio of each "
        "process), and give each stage CPUs of its own (num_cpus)"
    )


def _short_of_cpus(slow: Sequence[Request]) -> str:
    """More replicas do not help where all wait for the same CPUs."""
    waited = sum(sum(one.starved_ms.values()) for one in slow) / max(1e-9, sum(one.latency_ns / 1e6 for one in slow))
    if waited < _MUCH_STARVED:
        return ""
    own, of_all = cpus_used(slow)
    uses = f", and uses {own:.1f} of the {of_all:.1f} in use" if of_all else ""
    return f"; on the same CPUs that helps little: the application waited for one in {waited:.0%} of this time{uses}"


def cpus_used(slow: Sequence[Request]) -> tuple[float, float]:
    """How many CPUs the application's processes used while these waited for one, and all processes, on their host.

    On the host with most of them; zeros if nothing says it.
    """
    hosts = Counter(host for request in slow for _, host, _, _ in request.cpus)
    if not hosts:
        return 0.0, 0.0
    host = hosts.most_common(1)[0][0]
    own, of_all = defaultdict[str, list[float]](list), list[float]()
    for request in slow:
        for instance, where, used, by_all in request.cpus:
            if where == host:
                own[instance].append(used)
                of_all.append(by_all)
    return sum(map(fmean, own.values())), fmean(of_all)


def more_postprocessors(capture: Capture, _: Sequence[Request]) -> Fix:
    more = more_replicas(capture, "Postprocessor")
    return Fix("add replicas (", more, "), or request smaller responses (top_k, dimensions)")


def more_replicas(capture: Capture, deployment: str, wanted: int = 0, slow: Sequence[Request] = ()) -> Change:
    """Return the setting that gives more replicas: one more, or ``wanted`` if that is higher.

    If the deployment was scaled, but too late for these requests, or if it had fewer replicas than it may have, return
    the setting that keeps the replicas running.
    """
    path = f"deployments.{deployment}"
    most = capture.settings.get(f"{path}.autoscaling_config.max_replicas")
    orders = orders_during(capture.scalings, slow, deployment, capture.loads)
    ordered = [one.ordered for one in orders if one.ordered > one.replicas]
    if ordered:
        key = f"{path}.autoscaling_config.min_replicas"
        return Change(key, capture.settings.get(key), max(ordered))
    stage = deployment.lower()
    seen = len({request.replicas[stage] for request in capture.requests if stage in request.replicas})
    was_at_most = any(one.needed > one.most for one in orders)
    if most is not None and seen < most and not was_at_most:
        key = f"{path}.autoscaling_config.min_replicas"
        return Change(key, capture.settings.get(key), min(most, max(seen + 1, wanted)))
    if most is not None:
        return Change(f"{path}.autoscaling_config.max_replicas", most, max(most + 1, wanted))
    current = capture.settings.get(f"{path}.num_replicas", seen or 1)
    return Change(f"{path}.num_replicas", current, max(current + 1, wanted))

"""The metrics that a running application exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deployments.telemetry import metrics
from deployments.telemetry.metrics import METRICS, MetricSpec
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver

NEVER_WITHOUT_GPU = {m.name for m in METRICS if m.name.startswith(("ai.gpu.", "hw."))}
ONLY_WHEN_SOMETHING_IS_WRONG = {
    spec.name
    for spec in (
        metrics.OUT_OF_MEMORY,
        metrics.LOOP_STALLS,
        metrics.CPU_THROTTLED,
        metrics.CPU_STEAL,
        metrics.PRESSURE,
    )
}
# tests/e2e/test_prometheus.py calls over gRPC.
OVER_GRPC = {metrics.RPC_DURATION.name}
OF_GENERATIONS = {m.name for m in METRICS if m.is_of_generations}


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int], receiver: OtlpReceiver) -> int:
    receiver.clear()
    return deploy(model={"engine": "fake", "name": "fake-model"})


@pytest.fixture(scope="module")
def answers(port: int) -> list[Answer]:
    good = [call(port, "POST", "/v1/embeddings", {"input": ["a b", "c"]}) for _ in range(3)]
    return [*good, call(port, "POST", "/v1/embeddings", {"input": ""})]


def points(receiver: OtlpReceiver, spec: MetricSpec, enough: Callable[[list[Any]], bool] = bool) -> list[Any]:
    """Return the newest points of a metric, one per attribute set, once ``enough`` accepts them."""
    newest: list[Any] = []

    def arrived(_: object) -> bool:
        latest = {}
        for _service, metric, point in receiver.metrics():
            if metric.name == spec.name:
                assert metric.unit == spec.unit
                latest[tuple(sorted(attributes(point).items()))] = point
        newest[:] = latest.values()
        return enough(newest)

    receiver.wait_for(arrived)
    return newest


def attributes(point: Any) -> dict[str, str]:
    return {a.key: a.value.string_value or str(a.value.int_value) for a in point.attributes}


def test_every_declared_metric_is_exported_with_its_attributes(answers: list[Answer], receiver: OtlpReceiver) -> None:
    # tests/e2e/test_prometheus.py covers the metrics of the autoscaling policy.
    of_replicas = {m.name for m in METRICS if m.service != "autoscaler"}
    wanted = of_replicas - NEVER_WITHOUT_GPU - ONLY_WHEN_SOMETHING_IS_WRONG - OF_GENERATIONS - OVER_GRPC
    specs = {m.name: m for m in METRICS}
    receiver.wait_for(lambda _: wanted <= {metric.name for _, metric, _ in receiver.metrics()})

    for service, metric, point in receiver.metrics():
        if metric.name.startswith("otel.sdk."):
            continue
        spec = specs[metric.name]
        assert metric.description == spec.description
        assert set(attributes(point)) <= set(spec.attributes), metric.name
        assert spec.service in ("every", service.removeprefix("slowlens."))
    assert not NEVER_WITHOUT_GPU & {metric.name for _, metric, _ in receiver.metrics()}


def test_outcomes_tokens_and_sizes_are_counted(answers: list[Answer], receiver: OtlpReceiver) -> None:
    by_outcome = {
        attributes(p)["outcome"]: p.as_int
        for p in points(receiver, metrics.REQUESTS, lambda found: sum(p.as_int for p in found) == 4)
        if attributes(p)["model"] == "fake-model"
    }
    (tokens,) = points(receiver, metrics.TOKENS, lambda found: bool(found) and found[0].as_int == 3 * 7)
    (sizes,) = points(receiver, metrics.BATCH_SIZE, lambda found: bool(found) and found[0].count == 3)
    (loads,) = points(receiver, metrics.LOADS)
    dispatches = points(receiver, metrics.DISPATCHES, lambda found: sum(p.as_int for p in found) == 3)
    (warm,) = points(receiver, metrics.REPLICAS_WARM)

    # All are there from the start: what begins with a count has no increase.
    assert by_outcome == {"ok": 3, "invalid": 1, "error": 0, "overloaded": 0, "deadline": 0, "cancelled": 0}
    assert attributes(tokens) == {"model": "fake-model"}
    assert (sizes.sum, sizes.min, sizes.max) == (6, 2, 2)
    assert (loads.as_int, attributes(loads)["load_type"]) == (1, "cold")
    assert {attributes(p)["reason"] for p in dispatches} == {"device_idle"}
    assert warm.as_int == 1


def test_latency_exemplars_carry_the_trace_id(answers: list[Answer], receiver: OtlpReceiver) -> None:
    points(receiver, metrics.LATENCY, lambda found: sum(p.count for p in found) == 4)
    # Use the points of every export: each holds only the exemplars since the previous one.
    of_all = [point for _, metric, point in receiver.metrics() if metric.name == metrics.LATENCY.name]
    exemplars = {e.trace_id.hex() for point in of_all for e in point.exemplars}

    assert exemplars <= {answer.trace_id for answer in answers}
    assert exemplars


def test_server_duration_has_semantic_convention_attributes(answers: list[Answer], receiver: OtlpReceiver) -> None:
    found = points(receiver, metrics.HTTP_DURATION, lambda found: sum(p.count for p in found) == 4)
    ok, invalid = sorted((attributes(point) for point in found), key=lambda a: a["http.response.status_code"])

    expected = {"http.request.method": "POST", "http.route": "/v1/embeddings", "url.scheme": "http"}
    assert ok == {**expected, "http.response.status_code": "200"}
    assert invalid == {**expected, "http.response.status_code": "422", "error.type": "invalid_field"}


def test_processes_report_cpu_and_memory_use(answers: list[Answer], receiver: OtlpReceiver) -> None:
    receiver.wait_for(
        lambda _: len({s for s, m, _ in receiver.metrics() if m.name == metrics.PROCESS_MEMORY.name}) == 4
    )
    memory = [p.as_int for _, m, p in receiver.metrics() if m.name == metrics.PROCESS_MEMORY.name]
    cpu = [p.as_double for _, m, p in receiver.metrics() if m.name == metrics.PROCESS_CPU.name]

    assert min(memory) > 10e6
    assert all(0 <= value <= 1.5 for value in cpu)
    assert max(cpu) > 0


def test_generations_have_metrics_of_their_own(deploy: Callable[..., int], receiver: OtlpReceiver) -> None:
    receiver.clear()
    # So small a cache that sequences lose their place.
    generation = {"kv_cache_tokens": 64, "kv_reserve": 0.0}
    port = deploy(model={"engine": "fake", "task": "text-generation", "name": "lm"}, generation=generation)
    assert call(port, "POST", "/v1/completions", {"prompt": "a b c", "n": 3, "max_tokens": 40}).status == 200
    receiver.wait_for(lambda _: {metric.name for _, metric, _ in receiver.metrics()} >= OF_GENERATIONS)
    (tokens,) = points(receiver, metrics.OUTPUT_TOKENS, lambda found: bool(found) and found[0].as_int == 120)
    (first,) = points(receiver, metrics.TIME_TO_FIRST_TOKEN)
    (each,) = points(receiver, metrics.TIME_PER_OUTPUT_TOKEN)

    assert attributes(tokens) == {"model": "lm"}
    assert attributes(first) == {"gen_ai.operation.name": "text_completion", "gen_ai.request.model": "lm"}
    assert (first.count, each.count) == (1, 1)

"""Scaling on a multi-node Ray cluster on this machine: every stage from one replica to three, complete traces across
nodes, and the loss of one node under load."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.node import Node
from ray.cluster_utils import Cluster

from deployments.autoscaling.settings import POLICY
from deployments.telemetry import names
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver
from tests.support.process import is_healthy, serve_run, wait_for
from tests.support.traces import WHOLE_TRACE, WHOLE_TREE, Span, named, one, tree

PORT = 8000
STAGES = ("Ingress", "Tokenizer", "Model", "Postprocessor")
OTLP_PORT = 14318
CLIENTS = 40


def scaled(**policy_kwargs: float) -> dict[str, Any]:
    return {
        "min_replicas": 1,
        "max_replicas": 3,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "policy": {"policy_function": POLICY, "policy_kwargs": {"quiet_s": 600, **policy_kwargs}},
    }


# A run of 8 inputs takes 0.2 s, so with 40 clients two replicas leave 24 requests waiting. The other stages have
# little to do here, so their target utilization is only 0.001.
SCALING = {stage: scaled(target_queue_wait_ms=200, target_utilization=0.001) for stage in STAGES}
SCALING["Model"] = scaled(target_queue_wait_ms=100)
CONFIG: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": PORT},
    "logging_config": {"enable_access_log": False},
    "applications": [
        {
            "name": "slowlens",
            "import_path": "deployments.app:build",
            "args": {
                "model": {"engine": "fake", "fake": {"base_ms": 200, "load_ms": 200}},
                "batching": {"max_batch_size": 8},
            },
            "deployments": [
                {"name": stage, "autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 1}}
                for stage, scaling in SCALING.items()
            ],
        }
    ],
}


class Load:
    """Clients that each send one request after another."""

    def __init__(self, clients: int) -> None:
        self._stopped = threading.Event()
        self.answers: list[tuple[float, Answer]] = []
        """Each response with the monotonic time at which it arrived."""
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._stopped.is_set():
            answer = call(PORT, "POST", "/v1/embeddings", {"input": "a b c"})
            self.answers.append((time.monotonic(), answer))

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head node without CPUs and three worker nodes, whose processes export to ``OTLP_PORT``."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{OTLP_PORT}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        for _ in range(3):
            cluster.add_node(num_cpus=6)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def receiver(cluster: Cluster) -> Iterator[OtlpReceiver]:
    """Start after the cluster, because a process that serves gRPC cannot be forked."""
    receiver = OtlpReceiver(OTLP_PORT)
    yield receiver
    receiver.close()


def instances(spans: list[Span]) -> dict[str, set[str]]:
    """Return the replicas that handled requests, by stage."""
    found: dict[str, set[str]] = {}
    for span in spans:
        if span.name in WHOLE_TRACE:
            found.setdefault(span.service, set()).add(span.resource["service.instance.id"])
    return found


def ending(answer: Answer) -> str:
    if answer.status == 200:
        return "ok"
    if answer.status == 500 and answer.body == b"Internal Server Error":
        # Serve's proxy responds in place of an ingress replica that died.
        return "ingress died"
    return str(answer.error["code"])


def has_replicas(count: int) -> Callable[[list[Span]], bool]:
    def done(spans: list[Span]) -> bool:
        found = instances(spans)
        return len(found) == len(STAGES) and all(len(replicas) >= count for replicas in found.values())

    return done


def test_every_stage_scales_across_nodes_and_survives_the_loss_of_one(
    cluster: Cluster, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with serve_run(config, tmp_path / "serve.log", {}):
        assert call(PORT, "POST", "/v1/embeddings", {"input": "a b c"}).status == 200
        load = Load(CLIENTS)
        try:
            spans = receiver.wait_for(has_replicas(3), timeout_s=240)
            before_loss = len(load.answers)
            assert {answer.status for _, answer in load.answers} == {200}
            newest = {answer.trace_id for _, answer in load.answers[-50:]}
            whole = [receiver.trace(trace_id, names=WHOLE_TRACE) for trace_id in newest]
            spans = receiver.spans()

            receiver.clear()
            lost = cluster.worker_nodes.copy().pop()
            killed_at = time.monotonic()
            cluster.remove_node(lost, allow_graceful=False)
            # Every stage has three replicas again, now on two nodes.
            receiver.wait_for(
                lambda spans: has_replicas(3)([s for s in spans if s.resource["ray.node.id"] != lost.node_id]), 180
            )
        finally:
            load.stop()

    # Traces across nodes.
    for trace in whole:
        assert tree(trace, one(trace, names.PREDICT)) == WHOLE_TREE
    assert max(len({span.resource["ray.node.id"] for span in trace}) for trace in whole) > 1

    # Each scaling decision carries the values that it was based on.
    decisions = named(spans, names.SCALING_DECISION)
    reached = {d.attributes["ai.autoscaling.deployment"]: d.attributes["ai.autoscaling.to_replicas"] for d in decisions}
    assert reached == dict.fromkeys(STAGES, 3)
    assert {decision.service for decision in decisions} == {"slowlens.autoscaler"}
    first = next(d for d in decisions if d.attributes["ai.autoscaling.deployment"] == "Model")
    assert first.attributes["ai.autoscaling.from_replicas"] == 1
    assert first.attributes["ai.autoscaling.target_queue_wait_ms"] == 100
    assert first.attributes["ai.autoscaling.demand"] > 0.8 or first.attributes["ai.autoscaling.queue_wait_ms"] > 100
    assert first.start <= first.end

    # A replica gets requests as soon as it is ready, even while another has a long queue.
    runs = named(spans, names.BATCH_FORWARD)
    for loaded in named(spans, names.MODEL_LOAD)[1:]:
        replica = loaded.resource["service.instance.id"]
        first_run = min(run.start for run in runs if run.resource["service.instance.id"] == replica)
        assert (first_run - loaded.end) / 1e9 < 3

    # Losing a node fails only the requests that were on it.
    ends = Counter(ending(answer) for _, answer in load.answers[before_loss:])
    assert set(ends) <= {"ok", "replica_died", "no_replica_ready", "ingress died"}, ends
    assert ends["ok"] > 10 * (ends.total() - ends["ok"])
    last = [answer.status for at, answer in load.answers if at > killed_at][-CLIENTS:]
    assert set(last) == {200}


def test_draining_a_node_before_its_removal_fails_no_request(
    cluster: Cluster, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    """What a worker's ``preStop`` does in k8s/base/rayservice.yaml, ``slowlens drain``: here of one node of several."""
    application = {
        **CONFIG["applications"][0],
        "deployments": [{"name": stage, "num_replicas": 3, "ray_actor_options": {"num_cpus": 1}} for stage in STAGES],
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "applications": [application]}))
    with serve_run(config, tmp_path / "serve.log", {}):
        leaving = next(node for node in cluster.worker_nodes if replicas_on(node))
        load = Load(CLIENTS)
        try:
            receiver.wait_for(lambda spans: len(named(spans, names.PREDICT)) > 200)
            # All nodes share the proxy's port, on which the load's connections stay.
            code = f"""if True:
                import time
                from deployments.cli.drain import ServeCluster, drain
                own = ServeCluster(90, [{PORT}])
                own.node_id, own.connections = {leaving.node_id!r}, lambda: 0
                raise SystemExit(not drain(own, 90, time.monotonic, time.sleep))
            """
            subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
            assert not replicas_on(leaving)
            cluster.remove_node(leaving, allow_graceful=False)
            receiver.clear()
            receiver.wait_for(lambda spans: len(named(spans, names.PREDICT)) > 200)
        finally:
            load.stop()

    assert Counter(ending(answer) for _, answer in load.answers).keys() == {"ok"}


def replicas_on(node: Node) -> bool:
    raylet = node.all_processes["raylet"][0].process.pid
    return subprocess.run(["pgrep", "-P", str(raylet), "-f", "ray::ServeReplica"], capture_output=True).returncode == 0


def test_the_model_scales_from_and_to_zero_without_losing_requests(tmp_path: Path) -> None:
    from_zero = {**scaled(target_queue_wait_ms=500, quiet_s=1), "min_replicas": 0}
    application = {
        "name": "slowlens",
        "import_path": "deployments.app:build",
        "args": {"model": {"engine": "fake", "fake": {"base_ms": 5}}},
        "deployments": [{"name": "Model", "autoscaling_config": from_zero}],
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    receiver = OtlpReceiver()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }

    def asked() -> Answer:
        return call(PORT, "POST", "/v1/embeddings", {"input": "a b c"})

    def decided(spans: list[Span]) -> list[tuple[Any, Any]]:
        found = [decision.attributes for decision in named(spans, names.SCALING_DECISION)]
        return [(d["ai.autoscaling.from_replicas"], d["ai.autoscaling.to_replicas"]) for d in found]

    # Wait for Serve's own health check: ours reports that the model is not ready until a request arrives.
    log = tmp_path / "serve.log"
    with serve_run(config, log, env, health="/-/healthz") as process, ThreadPoolExecutor(10) as pool:
        unready = call(PORT, "GET", "/healthz")
        first = [pending.result() for pending in [pool.submit(asked) for _ in range(10)]]
        ready = call(PORT, "GET", "/healthz")
        cold = receiver.trace(first[0].trace_id, names=WHOLE_TRACE)
        receiver.wait_for(lambda spans: (1, 0) in decided(spans), 60)
        wait_for(lambda: not is_healthy(PORT, "/healthz"), log, process)
        again = asked()
        receiver.wait_for(lambda spans: len(named(spans, names.MODEL_LOAD)) == 2)
    receiver.close()

    assert (unready.status, ready.status) == (503, 200)
    assert [answer.status for answer in first] == [200] * 10
    assert one(cold, names.BATCHED_PREDICT).attributes["ai.model.load_type"] == "cold"
    assert again.status == 200

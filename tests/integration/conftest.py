"""One real cluster and one real OTLP receiver for all integration tests; each module deploys what it needs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray import serve

from deployments.app import build
from tests.support.otlp import OtlpReceiver
from tests.support.warnings import collect_what_ray_leaves_open, ignore_what_ray_leaves_open


def pytest_configure(config: pytest.Config) -> None:
    ignore_what_ray_leaves_open(config)


def pytest_sessionfinish() -> None:
    collect_what_ray_leaves_open()


@pytest.fixture(scope="package")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="package")
def cluster(receiver: OtlpReceiver) -> Iterator[int]:
    """Start a local cluster whose replicas export to the receiver, and yield its HTTP port."""
    before = dict(os.environ)
    os.environ.update(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    # More logical CPUs than real ones, because the stages wait for each other most of the time.
    ray.init(num_cpus=4, logging_level=logging.WARNING, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    yield port
    serve.shutdown()
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def deploy(cluster: int) -> Iterator[Callable[..., int]]:
    """Yield a function that replaces the application with one of these ``args``, waits for it and returns the port."""

    def run(**args: Any) -> int:
        undeploy()
        serve.run(build(args), name="slowlens")
        return cluster

    yield run
    undeploy()


def undeploy() -> None:
    if "slowlens" in serve.status().applications:
        serve.delete("slowlens")

"""What Serve needs of the classes that it runs."""

from __future__ import annotations

import inspect

import pytest

from deployments.app import ServedGenerationIngress, ServedIngress
from deployments.stages.replica import Stoppable


@pytest.mark.parametrize("ingress", [ServedIngress, ServedGenerationIngress])
def test_the_destructor_of_an_ingress_is_one_that_serve_awaits(ingress: type[Stoppable]) -> None:
    # serve.ingress drops what any other function returns, and with it the last telemetry and the open connections.
    assert inspect.iscoroutinefunction(ingress.__del__)

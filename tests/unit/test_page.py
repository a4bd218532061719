"""The page's application: its configuration, and what is built of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.cli.serve import check
from deployments.errors import ConfigError
from deployments.page import build


@pytest.fixture(autouse=True)
def no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"enable": True}, "args.enable: unknown key; known here: enabled, source, since, slowest, max_age_s"),
        ({"since": "15"}, "args.since: '15' must be a number followed by s, m, h or d, such as 15m"),
        ({"slowest": "0%"}, "args.slowest: '0%' must be a percentage above 0% and below 100%, such as 5%"),
        ({"max_age_s": -1.0}, "args.max_age_s"),
        ({"enabled": "yes"}, "args.enabled"),
    ],
)
def test_a_wrong_key_is_named(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build(args)
    assert message in str(refused.value)

    # And so it is by `slowlens serve`, before anything is started.
    config = tmp_path / "config.yaml"
    lines = [f"      {key}: {value!r}" for key, value in args.items()]
    config.write_text("\n".join(["applications:", "  - import_path: deployments.page:build", "    args:", *lines]))
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert message in str(refused.value)


def test_while_it_is_off_nothing_runs_for_it() -> None:
    scaling = build({})._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas) == (0, 0)
    on = build({"enabled": True})._bound_deployment
    assert (on._deployment_config.autoscaling_config, on.num_replicas) == (None, 1)


def test_a_page_of_a_store_that_nobody_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    with pytest.raises(ConfigError, match=r"args\.source: traces do not go to the local store here"):
        build({"enabled": True})
    build({"enabled": False})
    build({"enabled": True, "source": "http://tempo:3200"})

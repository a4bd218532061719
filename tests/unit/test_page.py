"""The page application: its configuration and what is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.cli.serve import check
from deployments.errors import ConfigError
from deployments.explain.options import PageConfig
from deployments.page import build, replicas_for


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
def test_an_invalid_key_is_named(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build(args)
    assert message in str(refused.value)

    # `slowlens serve` names it too, before anything starts.
    config = tmp_path / "config.yaml"
    lines = [f"      {key}: {value!r}" for key, value in args.items()]
    config.write_text("\n".join(["applications:", "  - import_path: deployments.page:build", "    args:", *lines]))
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert message in str(refused.value)


def test_a_disabled_page_runs_no_replica() -> None:
    off = replicas_for(PageConfig())["autoscaling_config"]

    assert (off["min_replicas"], off["initial_replicas"]) == (0, 0)
    assert replicas_for(PageConfig(enabled=True)) == {"num_replicas": 1}
    build({})
    build({"enabled": True})


def test_a_page_on_an_unused_local_store_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    with pytest.raises(ConfigError, match=r"args\.source: traces do not go to the local store here"):
        build({"enabled": True})
    build({"enabled": False})
    build({"enabled": True, "source": "http://tempo:3200"})

"""Configuration: what is rejected, the error messages, and that serve_config.yaml is valid for Serve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deployments.app import build
from deployments.autoscaling.settings import POLICY, PolicySettings
from deployments.config import AppConfig
from deployments.errors import ConfigError
from deployments.explain.options import PageConfig
from tests.support.process import with_page

CONFIG_PATH = Path(__file__).parents[2] / "serve_config.yaml"
CONFIG = yaml.safe_load(with_page(CONFIG_PATH.read_text()))
APPLICATION, PAGE = CONFIG["applications"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"modle": {}},
            "args.modle: unknown key; known here: model, tokenizer, batching, generation, limits, security, transport, "
            "telemetry",
        ),
        ({"model": {"dtyp": "x"}}, "args.model.dtyp: unknown key; known here: source, name"),
        ({"model": {"fake": {"wait": 1}}}, "args.model.fake.wait: unknown key; known here: base_ms"),
        ({"model": {"dtype": "int4"}}, "args.model.dtype: Input should be 'auto', 'float32'"),
        ({"batching": {"max_batch_size": 0}}, "args.batching.max_batch_size: Input should be greater than 0 (got 0)"),
        ({"batching": {"max_wait_ms": -1}}, "args.batching.max_wait_ms: Input should be greater than or equal to 0"),
        ({"batching": {"max_queue": 10}}, "limits.max_inputs (256) must be at most batching.max_queue (10)"),
        ({"batching": 3}, "args.batching: "),
        ({"batching": {"max_wait_ms": float("inf")}}, "args.batching.max_wait_ms: Input should be a finite number"),
        ({"batching": {"max_queue": "many"}}, "args.batching.max_queue: Input should be a valid integer"),
        ({"telemetry": {"capture_text": "yes"}}, "args.telemetry.capture_text: Input should be a valid boolean"),
        ({"limits": {"max_timeout_ms": 1}}, "limits.default_timeout_ms (60000) must be at most"),
        (
            {"telemetry": {"max_file_mb": 100, "max_total_mb": 50}},
            "telemetry.max_file_mb (100.0) must be at most a quarter",
        ),
    ],
)
def test_invalid_configuration_is_rejected_by_key(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        AppConfig.parse(args)

    assert message in str(refused.value)


def test_all_unknown_keys_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        AppConfig.parse({"model": {"a": 1}, "batching": {"b": 2}})

    assert "args.model.a" in str(refused.value)
    assert "args.batching.b" in str(refused.value)


def test_the_builder_validates_its_args() -> None:
    with pytest.raises(ConfigError, match=r"args\.model\.dtyp"):
        build({"model": {"dtyp": "x"}})


def test_serve_config_parses_and_builds() -> None:
    schema = ServeDeploySchema.model_validate(CONFIG)
    application, page = schema.applications

    assert (page.name, page.route_prefix, page.import_path) == ("slowlens-page", "/slowlens", "deployments.page:build")
    assert (application.name, application.route_prefix, application.import_path) == (
        "slowlens",
        "/",
        "deployments.app:build",
    )
    assert isinstance(build(application.args), Application)


def test_serve_config_states_the_defaults() -> None:
    """Deleting a line does not change its value."""
    stated, defaults = AppConfig.parse(APPLICATION["args"]), AppConfig.parse({})

    assert stated.model_copy(update={"model": defaults.model}) == defaults
    assert stated.model.model_copy(update={"name": None}) == defaults.model
    assert PageConfig.parse(PAGE["args"]) == PageConfig()


def test_serve_knows_every_key_outside_args() -> None:
    """Serve silently drops unknown keys there."""
    unknown = list(unknown_keys(CONFIG, ServeDeploySchema, ""))

    assert unknown == []


def test_the_benchmark_configs_are_valid() -> None:
    paths = list(CONFIG_PATH.parent.glob("benchmarks/*.yaml"))
    assert paths
    for path in paths:
        config = yaml.safe_load(path.read_text())
        assert list(unknown_keys(config, ServeDeploySchema, "")) == []
        AppConfig.parse(config["applications"][0]["args"])


def test_the_key_check_finds_typos() -> None:
    deployment = {"name": "Model", "num_replica": 2, "autoscaling_config": {"min_replica": 1, "policy": {"kwargs": {}}}}
    typo = {"applications": [{"deployments": [deployment]}], "http_option": {}}

    assert list(unknown_keys(typo, ServeDeploySchema, "")) == [
        "applications.deployments.num_replica",
        "applications.deployments.autoscaling_config.min_replica",
        "applications.deployments.autoscaling_config.policy.kwargs",
        "http_option",
    ]


def unknown_keys(values: dict[str, Any], schema: type[BaseModel], where: str) -> list[str]:
    found = []
    for key, value in values.items():
        field = schema.model_fields.get(key)
        if field is None:
            found.append(where + key)
            continue
        inner = AutoscalingConfig if key == "autoscaling_config" else nested_model(field.annotation)
        if inner is None or key in ("args", "policy_kwargs"):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                found += unknown_keys(item, inner, f"{where}{key}.")
    return found


def nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for part in getattr(annotation, "__args__", ()) if (m := nested_model(part))), None)


def test_deployment_names_match_the_builder() -> None:
    assert sorted(d["name"] for d in APPLICATION["deployments"]) == ["Ingress", "Model", "Postprocessor", "Tokenizer"]


def test_all_stages_fit_on_two_cores() -> None:
    least = {d["name"]: d["autoscaling_config"]["min_replicas"] for d in APPLICATION["deployments"]}

    assert sum(least[d["name"]] * d["ray_actor_options"]["num_cpus"] for d in APPLICATION["deployments"]) <= 2


def test_every_stage_is_scaled_only_by_the_policy() -> None:
    for deployment in APPLICATION["deployments"]:
        scaling = AutoscalingConfig(**deployment["autoscaling_config"])
        assert scaling.policy.policy_function == POLICY
        assert PolicySettings.parse(scaling.policy.policy_kwargs)
        assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 0)
        assert "num_replicas" not in deployment


def test_every_stage_accepts_more_requests_than_the_queue_holds() -> None:
    for deployment in APPLICATION["deployments"]:
        assert deployment["max_ongoing_requests"] > APPLICATION["args"]["batching"]["max_queue"]


def test_every_value_is_commented() -> None:
    """Every key, or the first key of a group explained together, has a comment above it."""
    lines = CONFIG_PATH.read_text().splitlines()
    explained = False
    uncommented = []
    seen_before: set[str] = set()
    for line in lines:
        if line.strip().startswith("#"):
            explained = True
        elif not line.strip():
            explained = False
        elif match := re.match(r"\s*(?:- )?(\w+):(\s+\S.*)?$", line):
            key, value = match.groups()
            if value is not None and not explained and key not in seen_before:
                uncommented.append(key)
            if value is None:
                explained = False
            seen_before.add(key)
    assert uncommented == []

"""What the README says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import deployments
from deployments.telemetry.names import SPANS
from tests.support.readme import README, with_tables

ROOT = README.parent


def test_the_tables_are_those_of_the_code() -> None:
    text = README.read_text()

    assert with_tables(text) == text, "run: python -m tests.support.readme"


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^pip install .*&& pytest$", README.read_text(), re.MULTILINE)

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_file_that_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_the_port_and_model_of_the_examples_are_those_of_the_config() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    text = README.read_text()

    assert f"localhost:{config['http_options']['port']}/v1/embeddings" in text
    assert config["applications"][0]["args"]["model"]["name"] in text


def test_versions_agree() -> None:
    assert f'version = "{deployments.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {deployments.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_span_attributes_in_the_table_are_all_that_the_code_emits() -> None:
    """Every attribute name that spans are made with stands in the table, and the other way round."""
    telemetry = Path(deployments.__file__).with_name("telemetry")
    source = (telemetry / "spans.py").read_text() + (telemetry / "wire.py").read_text()
    source += (telemetry / "decisions.py").read_text()
    emitted = set(re.findall(r'"((?:ai|http|url|client|gen_ai|error)\.[a-z_.]+)"', source))
    listed = {attribute for spec in SPANS for attribute in spec.attributes}

    assert emitted == listed

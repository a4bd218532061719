"""What the README says is what the code does."""

from __future__ import annotations

import re

import yaml

import deployments
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

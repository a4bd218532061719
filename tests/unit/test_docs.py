"""What the documentation says is what the code does: tables, links, anchors, commands, the architecture's picture."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import deployments
from deployments.cli.main import parser
from scripts.docs_tables import pages, tables, tables_in, with_tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*pages(), *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
DOCS = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tables_are_those_of_the_code(page: Path) -> None:
    assert with_tables(page.read_text()) == page.read_text(), "run: python scripts/docs_tables.py"


def test_every_generated_table_is_on_a_page() -> None:
    assert sorted(name for page in PAGES for name in tables_in(page.read_text())) == sorted(tables())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_or_anchor_is_dead(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_modules_in_code_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:deployments|benchmarks|tests|scripts|k8s|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"python ((?:benchmarks|scripts)/[\w./]+)", text):
        assert (ROOT / script).exists(), script
    for module, function in re.findall(r"`?(deployments(?:\.[a-z_]+)+):(\w+)", text):
        file = ROOT.joinpath(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if page.name != "CHANGELOG.md" and "lens" not in module:
            assert function in file.read_text(), f"{module}:{function}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_slowlens_exist(page: Path) -> None:
    """``slowlens serve`` hands what follows on; of all others every option is one that the command has."""
    for line in re.findall(r"slowlens ((?:why|trace|live|serve)\b[^`\n|]*)", page.read_text()):
        command, *rest = line.split()
        if command == "serve":
            continue
        known = options_of(command)
        for option in (word for word in rest if re.fullmatch(r"--?[a-z][\w-]*", word)):
            assert option in known, f"slowlens {line}"


def options_of(command: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parser().parse_args([command, "--help"])
    return set(re.findall(r"(?<!\S)--?[a-z][\w-]*", said.getvalue()))


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_page_opens_with_the_question_that_it_answers(page: Path) -> None:
    title, blank, question, *_ = page.read_text().splitlines()

    assert title.startswith("# ")
    assert not blank
    assert question.endswith("?")


def test_every_page_is_in_the_index() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in _LINK.findall(README.read_text())}
    records = (ROOT / "docs" / "decisions" / "README.md").read_text()

    for page in DOCS:
        assert page in linked or page.name in records, page


def test_the_picture_of_the_rooms_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent for path in (ROOT / "deployments").rglob("*.py")} - {ROOT / "deployments"}

    for room in rooms:
        assert re.search(rf"^ +{room.name}/ ", text, re.MULTILINE), room


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^pip install .*&& pytest$", README.read_text(), re.MULTILINE)

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "scripts/check" in (ROOT / ".ci" / "run").read_text()


def test_the_port_and_model_of_the_examples_are_those_of_the_config() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    text = README.read_text()

    assert f"localhost:{config['http_options']['port']}/v1/embeddings" in text
    assert config["applications"][0]["args"]["model"]["name"] in text


def test_the_version_has_one_source_and_a_section_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "deployments.__version__"}
    assert f"## {deployments.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_module_is_without_a_docstring() -> None:
    for path in (ROOT / "deployments").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path

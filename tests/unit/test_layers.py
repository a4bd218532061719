"""Imports point one way, and the big libraries stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deployments"
# From the bottom up: a module may import from its own row and from rows before it.
LAYERS = [
    {"", "errors", "messages", "config"},
    {"telemetry", "cost"},
    {"grouping"},
    {"cutting"},
    {"engine", "batching", "explain", "sharing", "autoscaling"},
    {"replica", "readiness", "timing", "api", "front", "load", "routing"},
    {"tokenizer", "model", "postprocessor", "hop"},
    {"ingress"},
    {"app", "launch", "lens"},
    {"command"},
]
ONLY_IN = {
    "opentelemetry": {"telemetry"},
    "pynvml": {"telemetry"},
    "torch": {"engine"},
    "transformers": {"engine"},
    "tokenizers": {"engine"},
    "huggingface_hub": {"engine"},
    "fastapi": {"front", "ingress", "lens"},
    "starlette": {"front"},
    "ray": {"app", "autoscaling", "hop", "ingress", "lens", "model", "readiness", "replica", "routing"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(path)
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "deployments":
            target = rest.partition(".")[0]
            assert target == own or layer(target) <= layer(own), f"{own} imports {name}"
        elif root in ONLY_IN:
            assert own in ONLY_IN[root], f"{own} imports {name}"


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} == set().union(*LAYERS)


def test_names_are_data_only() -> None:
    assert imports(PACKAGE / "telemetry" / "names.py") <= {"__future__", "dataclasses", "typing"}

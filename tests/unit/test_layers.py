"""Package structure: imports point one way, packages stay small, and large libraries stay where they belong."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deployments"
MAX_FILES = 9
# From the bottom up: a module may import from its own row and from rows before it. A package that is not listed
# belongs to its nearest listed parent.
LAYERS = [
    {"", "errors"},
    {"config", "messages", "batching"},
    {"telemetry.names", "telemetry.metrics", "telemetry.span_specs"},
    {"telemetry.generation.facts"},
    {"telemetry.carrier", "telemetry.records"},
    {"telemetry.generation.records"},
    {"telemetry.sampling"},
    {"telemetry.measures", "telemetry.export"},
    {"telemetry.gauges", "telemetry.spans"},
    {"telemetry.generation.spans"},
    {"telemetry", "engine"},
    {"telemetry.generation"},
    {"explain.traces"},
    {"explain.counted"},
    {"explain.requests"},
    {"explain.token_gaps"},
    {"explain.fixes"},
    {"explain.causes", "explain.findings"},
    {"explain.periods"},
    {"explain.chance"},
    {"explain.verdict"},
    {"explain", "autoscaling", "transport", "http", "protocols", "doctor"},
    {"stages", "simulate", "page"},
    {"app"},
    {"gateway"},
    {"cli"},
]
ONLY_IN = {
    "opentelemetry": {"telemetry"},
    "pynvml": {"telemetry"},
    "torch": {"engine"},
    "transformers": {"engine"},
    "tokenizers": {"engine"},
    "huggingface_hub": {"engine"},
    "fastapi": {"gateway", "http", "stages", "page"},
    "starlette": {"http"},
    "ray": {"app", "autoscaling", "cli", "gateway", "page", "stages", "transport"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({path.parent for path in MODULES})


def dotted(path: Path) -> str:
    """``telemetry.export.sinks``; the empty string is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if is_module(module) else node.module for module in modules}
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def layer(module: str) -> int:
    """Return the layer of the longest listed prefix."""
    if not module:
        return 0
    while module:
        for level, rooms in enumerate(LAYERS):
            if module in rooms:
                return level
        module = module.rpartition(".")[0]
    raise AssertionError("has no layer")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path: Path) -> None:
    own = dotted(path)
    room = own.partition(".")[0]
    for name in imports(path):
        root, _, target = name.partition(".")
        if root == "deployments":
            assert layer(target) <= layer(own), f"{own} imports {name}"
        elif root in ONLY_IN:
            assert room in ONLY_IN[root], f"{own} imports {name}"


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    modules = {dotted(path) for path in MODULES}

    assert all(layer(module) >= 0 for module in modules)
    assert set().union(*LAYERS) <= modules


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: dotted(room / "__init__.py") or "deployments")
def test_packages_are_small(room: Path) -> None:
    assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= MAX_FILES
    assert (room / "__init__.py").read_text().startswith('"""'), "a package docstring must state its purpose"


@pytest.mark.parametrize("name", ["names", "metrics", "span_specs"])
def test_names_are_data_only(name: str) -> None:
    found = imports(PACKAGE / "telemetry" / f"{name}.py")
    assert found <= {"__future__", "dataclasses", "typing", "deployments.telemetry.names"}


def test_the_policy_imports_only_the_standard_library() -> None:
    """Serve's controller gets it by value; the reporting code is imported when the first decision is reported."""
    for name in ("__init__", "policy", "decide", "report", "settings", "announce"):
        tree = ast.parse((PACKAGE / "autoscaling" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module}
        assert all(
            module.startswith("deployments.autoscaling.") or module.partition(".")[0] in sys.stdlib_module_names
            for module in found
        ), name


def test_explain_runs_without_the_server() -> None:
    """``slowlens why`` must not wait for Ray or torch."""
    data = {"deployments.telemetry.names", "deployments.telemetry.metrics", "deployments.telemetry.span_specs"}
    data |= {"deployments.telemetry.sampling.threshold", "deployments.telemetry.export.prometheus_names"}
    allowed = {"deployments", "deployments.config", "deployments.batching.cost"} | data
    for path in MODULES:
        if dotted(path).startswith("explain"):
            ours = {name for name in imports(path) if name.startswith("deployments")}
            assert all(name in allowed or name.startswith("deployments.explain") for name in ours), path

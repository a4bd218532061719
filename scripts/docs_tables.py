"""Generated tables of the documentation, from the code and from the results of the benchmarks.

``python scripts/docs_tables.py`` writes them into the pages; a test fails where they differ.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deployments.cli.serve import FAST
from deployments.config import AppConfig
from deployments.errors import ApiError
from deployments.explain.options import PageConfig
from deployments.telemetry.metrics import METRICS
from deployments.telemetry.span_specs import SPANS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "throughput.json"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
# The workload and the figure of each column.
SPEED = {
    "1 client": ("short-1", "requests_per_s"),
    "16 clients": ("short-16", "requests_per_s"),
    "64 clients": ("short-64", "requests_per_s"),
    "64 clients, 3 to 250 words": ("mixed-64", "requests_per_s"),
    "CPU ms a request, 64 clients": ("short-64", "cpu_ms_per_request"),
    "p50 ms, 1 client": ("short-1", "p50_ms"),
    "p99 ms, 50 % of the best peer's rate": ("open-50", "p99_ms"),
    "p99 ms, 80 %": ("open-80", "p99_ms"),
}


def tables() -> dict[str, str]:
    """Each table by the name in its markers."""
    return {
        "configuration": table(("key", "default", "what it does"), configuration(AppConfig, "")),
        "page": table(("key", "default", "what it does"), configuration(PageConfig, "")),
        "environment": table(("variable", "value", "what it does"), environment()),
        "generation": (RESULTS.parent / "generation.md").read_text().strip(),
        "hop": (RESULTS.parent / "hop.md").read_text().strip(),
        "diagnosis": (RESULTS.parent / "diagnosis.md").read_text().strip(),
        "diagnosis_fixes": (RESULTS.parent / "diagnosis_fixes.md").read_text().strip(),
        "scaling": (RESULTS.parent / "scaling.md").read_text().strip(),
        "scaling_real": (RESULTS.parent / "scaling_real.md").read_text().strip(),
        "size": (RESULTS.parent / "explain_size.md").read_text().strip(),
        "what_if": (RESULTS.parent / "what_if.md").read_text().strip(),
        "errors": table(("status", "code", "type"), errors()),
        "spans": table(("span", "kind", "emitted by", "parent", "attributes"), spans()),
        "speed": table(("server", *SPEED), speed()),
        "metrics": table(("metric", "kind", "unit", "emitted by", "what it is", "attributes"), metrics()),
    }


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def configuration(section: type[BaseModel], path: str) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from configuration(inner, f"{path}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
            assert field.description, f"{path}{name} has no description"
            yield f"`{path}{name}`", f"`{shown}`", field.description


def environment() -> Iterator[tuple[str, ...]]:
    for name, setting in FAST.items():
        yield f"`{name}`", f"`{setting.value}`", setting.reason


def errors() -> Iterator[tuple[str, ...]]:
    for kind in sorted(ApiError.__subclasses__(), key=lambda kind: (kind.status, kind.code)):
        yield str(kind.status), f"`{kind.code}`", f"`{kind.type}`"


def spans() -> Iterator[tuple[str, ...]]:
    for spec in SPANS:
        attributes = ", ".join(f"`{name}`" for name in spec.attributes)
        parent = f"`{spec.parent}`" if spec.parent.startswith("ai.") else spec.parent
        yield f"`{spec.name}`", spec.kind, spec.service, parent, attributes


def metrics() -> Iterator[tuple[str, ...]]:
    for spec in METRICS:
        attributes = ", ".join(f"`{name}`" for name in spec.attributes)
        yield f"`{spec.name}`", spec.kind, f"`{spec.unit}`", spec.service, spec.description, attributes


def speed() -> Iterator[tuple[str, ...]]:
    """Medians of the rounds."""
    rows = json.loads(RESULTS.read_text())["rows"]
    for server in sorted({row["server"] for row in rows}, key=lambda name: (not name.startswith("slowlens"), name)):
        cells = []
        for workload, figure in SPEED.values():
            found = [
                row[figure] for row in rows if (row["server"], row["workload"]) == (server, workload) and figure in row
            ]
            cells.append(f"{statistics.median(found):.3g}" if found else "")
        yield server, *cells


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """The page with its tables made anew. Raises KeyError where it has a table that is not made here."""
    made = tables()
    return _TABLE.sub(lambda match: match[1] + made[match[2]] + match[3], text)


def tables_in(text: str) -> list[str]:
    return [match[2] for match in _TABLE.finditer(text)]


if __name__ == "__main__":
    for page in pages():
        text = page.read_text()
        if (fresh := with_tables(text)) != text:
            page.write_text(fresh)
            print(f"{page.relative_to(ROOT)}: written")

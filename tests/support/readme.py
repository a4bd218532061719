"""The tables of the README, made from the code.

``python -m tests.support.readme`` writes them into README.md; a test fails where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deployments.config import AppConfig
from deployments.errors import ApiError
from deployments.launch import FAST
from deployments.telemetry.names import METRICS, SPANS

README = Path(__file__).parents[2] / "README.md"


def tables() -> dict[str, str]:
    """Each table by the name in its markers."""
    return {
        "configuration": table(("key", "default", "what it does"), configuration(AppConfig, "")),
        "environment": table(("variable", "value", "what it does"), environment()),
        "errors": table(("status", "code", "type"), errors()),
        "spans": table(("span", "kind", "emitted by", "parent", "attributes"), spans()),
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


def with_tables(text: str) -> str:
    for name, content in tables().items():
        marked = re.compile(f"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        assert marked.search(text), f"README.md has no table {name}"
        text = marked.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))

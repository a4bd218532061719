"""What was found, as a page of text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from deployments.doctor.problems import Problem

_WIDTH = 10


def as_text(summary: Sequence[str], problems: Sequence[Problem]) -> str:
    lines = [*summary, ""]
    for one in problems:
        lines.append(f"{one.severity:<{_WIDTH}}{one.title}")
        lines += [f"{'':<{_WIDTH}}{line}" for line in one.evidence]
        lines += [f"{'':<{_WIDTH}}-> {one.fix}", ""]
    if not any(one.severity != "note" for one in problems):
        lines.append("nothing is wrong that the API server knows of; for slow requests, ask `slowlens why`")
    return "\n".join(lines).rstrip() + "\n"


def as_json(summary: Sequence[str], problems: Sequence[Problem]) -> str:
    return json.dumps({"summary": list(summary), "problems": [asdict(one) for one in problems]}, indent=2) + "\n"

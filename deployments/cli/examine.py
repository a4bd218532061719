"""``slowlens doctor``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from deployments.doctor.checks import problems, summary
from deployments.doctor.report import as_json, as_text
from deployments.doctor.snapshot import NoAnswer, read


def doctor(namespace: str, context: str | None, form: str) -> int:
    """Return the exit status: 0, nothing is wrong; 1, something is, or the API server does not answer.

    Raises ConfigError if there is no kubectl.
    """
    try:
        snapshot = read(namespace, context)
    except NoAnswer as error:
        print(f"slowlens: the API server cannot be asked: {error}", file=sys.stderr)  # noqa: T201
        return 1
    found = problems(snapshot, datetime.now(UTC))
    sys.stdout.write((as_json if form == "json" else as_text)(summary(snapshot), found))
    return 1 if any(one.severity != "note" for one in found) else 0

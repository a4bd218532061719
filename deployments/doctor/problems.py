"""What is found: how bad it is, what shows it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["broken", "degraded", "note"]
ORDER: tuple[Severity, ...] = ("broken", "degraded", "note")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    kind: a name that does not change, such as ``no_image``, for scripts.
    severity: ``broken``, requests or telemetry are lost now; ``degraded``, they would be with the next disturbance;
        ``note``, worth knowing.
    """

    kind: str
    severity: Severity
    title: str
    evidence: tuple[str, ...]
    fix: str

"""The ``ot`` part of a ``tracestate``: which threshold a trace has passed, and its randomness.

https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/
"""

from __future__ import annotations

BITS, DIGITS = 56, 14


def threshold(ot: str) -> int | None:
    """Return ``th``, below ``2**BITS``; None if there is none. Trailing zeros are not written."""
    digits = member(ot, "th")
    try:
        return int(digits, 16) << 4 * (DIGITS - len(digits)) if 0 < len(digits) <= DIGITS else None
    except ValueError:
        return None


def written(at_least: int) -> str:
    """``th:c``."""
    return f"th:{f'{at_least:0{DIGITS}x}'.rstrip('0') or '0'}"


def member(ot: str, name: str) -> str:
    """Return a value by its name; empty if it is not there."""
    for one in ot.split(";"):
        if one.startswith(f"{name}:"):
            return one[len(name) + 1 :]
    return ""

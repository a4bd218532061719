"""What the command and the page may be asked for, and the page's configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from deployments.config import Section


def duration_s(text: str) -> int:
    """Seconds of ``90s``, ``15m``, ``2h`` or ``1d``. Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not (number.isascii() and number.isdecimal()) or not int(number):
        raise ValueError(f"{text!r} must be a number of s, m, h or d, as 15m")
    return int(number) * units[unit]


def share(text: str) -> float:
    """``5%`` as 0.05. Raises ValueError."""
    try:
        part = float(text.removesuffix("%")) / 100
    except ValueError:
        part = -1.0
    if not 0 < part < 1:
        raise ValueError(f"{text!r} must be a percentage above 0% and below 100%, as 5%")
    return part


def _is_duration(text: str) -> str:
    duration_s(text)
    return text


def _is_share(text: str) -> str:
    share(text)
    return text


class PageConfig(Section):
    """``args`` of the application that serves the verdict as a page."""

    enabled: bool = Field(False, description="Whether the page is served. It shows what the traces hold, to anybody.")
    source: str | None = Field(
        None,
        description="A file or folder of OTLP JSON lines, or the URL of a Jaeger query service or of Tempo. Default: "
        "the local store of the head node.",
    )
    since: Annotated[str, AfterValidator(_is_duration)] = Field(
        "15m", description="Only requests that ended so long ago at most; `?since=` asks for another."
    )
    slowest: Annotated[str, AfterValidator(_is_share)] = Field(
        "5%", description="Which requests are slow; `?slowest=` asks for another."
    )
    max_age_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="How long an answer is given again before the traces are read anew."
    )

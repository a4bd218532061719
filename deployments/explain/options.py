"""Option parsing shared by the command and the page, and the page's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, Field

from deployments.config import Section

_DIGITS, _LONGEST_DAYS = 9, 3660
_CLUSTER = "cluster:"


def duration_s(text: str) -> int:
    """Parse ``90s``, ``15m``, ``2h`` or ``1d`` into seconds. Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not (number.isascii() and number.isdecimal()) or not int(number[:_DIGITS]):
        raise ValueError(f"{text!r} must be a number followed by s, m, h or d, such as 15m")
    seconds = int(number[:_DIGITS]) * units[unit]
    if len(number) > _DIGITS or seconds > _LONGEST_DAYS * 86400:
        raise ValueError(f"{text!r} is longer than {_LONGEST_DAYS}d")
    return seconds


def target_s(text: str) -> float:
    """Parse ``300ms`` or ``1.5s`` into seconds. Raises ValueError."""
    unit = 1e3 if text.endswith("ms") else 1.0
    try:
        seconds = float(text.removesuffix("ms").removesuffix("s")) / unit
    except ValueError:
        seconds = math.nan
    if not (text.endswith("s") and 0 < seconds < _LONGEST_DAYS * 86400):
        raise ValueError(f"{text!r} must be a time above 0 followed by ms or s, such as 300ms")
    return seconds


def factor(text: str) -> float:
    """Parse ``1.5``. Raises ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.01 <= number <= 100:
        raise ValueError(f"{text!r} must be a number from 0.01 to 100")
    return number


def share(text: str) -> float:
    """Parse ``5%`` into 0.05. Raises ValueError."""
    try:
        part = float(text.removesuffix("%")) / 100
    except ValueError:
        part = -1.0
    if not 0 < part < 1:
        raise ValueError(f"{text!r} must be a percentage above 0% and below 100%, such as 5%")
    return part


@dataclass(frozen=True, slots=True)
class Against:
    """What ``--against`` names: a period or a Ray cluster of the same source, or another source."""

    source: str | None
    since_ns: int = 0
    until_ns: float = float("inf")
    cluster: str | None = None


def against(text: str, since_s: int | None, now_ns: int) -> Against:
    """Parse ``1d``, ``2026-11-25T10:00Z..2026-11-25T11:00Z``, ``cluster:NAME``, or a path or URL. Raises ValueError.

    Args:
        text: as given.
        since_s: length of the period that is compared; None if it is everything.
        now_ns: when that period ends, in Unix nanoseconds.
    """
    if text.startswith(_CLUSTER):
        if text == _CLUSTER:
            raise ValueError(f"{text!r} must name a Ray cluster, such as cluster:slowlens-abcde")
        return Against(None, cluster=text.removeprefix(_CLUSTER))
    begin, dots, end = text.partition("..")
    if dots and begin[:1].isdecimal():
        period = Against(None, _unix_ns(begin), _unix_ns(end))
        if period.since_ns >= period.until_ns:
            raise ValueError(f"{text!r} ends before it begins")
        return period
    try:
        ago_s = duration_s(text)
    except ValueError:
        if text[-1:] in "smhd" and text[:-1].isdecimal():
            raise
        return Against(text)
    if since_s is None:
        raise ValueError(f"{text!r} is the same period {text} earlier: say with --since how long it is")
    if ago_s < since_s:
        raise ValueError(f"the period {text} earlier overlaps the last {since_s} s: at least {since_s}s is needed")
    until_ns = now_ns - ago_s * 10**9
    return Against(None, until_ns - since_s * 10**9, until_ns)


def _unix_ns(text: str) -> int:
    """Parse a time of ISO 8601, in UTC unless it says otherwise. Raises ValueError."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} must be a time such as 2026-11-25T10:00Z") from None
    return round((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1e9)


def _is_duration(text: str) -> str:
    duration_s(text)
    return text


def _is_share(text: str) -> str:
    share(text)
    return text


class PageConfig(Section):
    """``args`` of the application that serves the verdict as a page."""

    api_keys: str | None = Field(
        None,
        description="Keys that open the page, as `security.api_keys` of the application; a browser asks for them as a "
        "password. Default: no key is needed.",
    )
    source: str | None = Field(
        None,
        description="A file or folder of OTLP JSON lines, or the URL of a Jaeger query service or of Tempo. Default: "
        "the local store of the head node.",
    )
    metrics: str | None = Field(
        None,
        description="URL of a Prometheus that scrapes the same processes: the page also says what they counted.",
    )
    since: Annotated[str, AfterValidator(_is_duration)] = Field(
        "15m", description="Only requests that ended within this period; `?since=` overrides it."
    )
    max_since: Annotated[str, AfterValidator(_is_duration)] = Field("24h", description="Longest `?since=`.")
    slowest: Annotated[str, AfterValidator(_is_share)] = Field(
        "5%", description="Share of the requests that count as slow; `?slowest=` overrides it."
    )
    max_age_s: Annotated[float, Field(ge=0)] = Field(
        5.0, description="How long a result is reused before the traces are read again."
    )

"""How long a request was before the ingress, as proxies say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.http.front import Front, parse_start

MS, S = 10**6, 10**9
NOW = 1_700_000_000 * S


@pytest.mark.parametrize(
    ("text", "unix_ns"),
    [
        ("t=1700000000.123", NOW + 123 * MS),
        ("1700000000.5", NOW + 500 * MS),
        ("1700000000", NOW),
        ("t=1700000000123", NOW + 123 * MS),
        ("1700000000123", NOW + 123 * MS),
        (" t=1700000000123456 ", NOW + 123_456_000),
        ("1700000000123456", NOW + 123_456_000),
    ],
)
def test_every_way_of_writing_it(text: str, unix_ns: int) -> None:
    assert parse_start(text) == pytest.approx(unix_ns, abs=1000)


@pytest.mark.parametrize(
    "text", ["", "t=", "soon", "-1", "1e9", "0", "12", "9" * 17, "1.2.3", "\u0661700000000", "t=t=1700000000"]
)
def test_anything_else_is_ignored(text: str) -> None:
    assert parse_start(text) is None
    assert Front(lambda: NOW).elapsed_ns({"x-request-start": text}) == 0


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_nothing(text: str) -> None:
    found = parse_start(text)
    assert found is None or found > 0


def test_the_time_since_then() -> None:
    front = Front(lambda: NOW + 250 * MS)
    assert front.elapsed_ns({}) == 0
    assert front.elapsed_ns({"x-request-start": "t=1700000000"}) == 250 * MS
    assert front.elapsed_ns({"x-request-start": "t=1600000000"}) == 0, "years ago"
    assert front.elapsed_ns({"x-request-start": "t=1800000000"}) == 0, "in years"


def test_a_clock_that_is_ahead_is_bounded_by_the_quickest_request() -> None:
    now_s = [0.0]
    front = Front(lambda: NOW, lambda: now_s[0])

    def elapsed_ms(ahead_ms: int, took_ms: int) -> float:
        return round(front.elapsed_ns({"x-request-start": f"{(NOW // MS) + ahead_ms - took_ms}"}) / MS)

    assert elapsed_ms(500, 10) == 0
    assert elapsed_ms(500, 40) == 30
    assert elapsed_ms(500, 5) == 0
    assert elapsed_ms(500, 40) == 35
    # When the clock is right again, this is known after five minutes.
    for _ in range(6):
        now_s[0] += 61
        elapsed_ms(0, 20)
    assert elapsed_ms(0, 20) == 20

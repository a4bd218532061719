"""Tenants share order and room: properties over random arrivals."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.batching.fairness import FairOrder, may_hold
from deployments.messages import Share

TOKENS = st.lists(st.integers(1, 500), min_size=60, max_size=60)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.sampled_from([0.0, 700.0]), st.data())
def test_with_one_tenant_it_is_the_order_of_arrival(tokens: list[int], credit: float, data: st.DataObject) -> None:
    order, share, waiting = FairOrder(), Share("only"), []
    order.credit = credit
    for number, size in enumerate(tokens):
        waiting.append((order.tag(share, size), number))
        assert waiting == sorted(waiting)
        if data.draw(st.booleans()):
            order.served(waiting.pop(0)[0])


@given(TOKENS, TOKENS, st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.sampled_from([0.0, 700.0]))
def test_who_always_waits_gets_tokens_by_weight(
    first: list[int], second: list[int], weight: float, credit: float
) -> None:
    order, shares = FairOrder(), (Share("a"), Share("b", weight))
    order.credit = credit
    waiting = [
        (order.tag(share, size), share, size)
        for share, sizes in zip(shares, (first, second), strict=True)
        for size in sizes
    ]
    got: Counter[str] = Counter()
    left = Counter({"a": len(first), "b": len(second)})
    for tag, share, size in sorted(waiting, key=lambda one: one[0]):
        order.served(tag)
        got[share.tenant] += size
        left[share.tenant] -= 1
        if not all(left[name] for name in "ab"):
            break
        # Start-time fair queueing: within one of the longest inputs of each, and the credit.
        assert abs(got["a"] - got["b"] / weight) <= 500 + 500 / weight + credit


@given(st.integers(1, 500))
def test_who_comes_with_little_is_next_but_one(size: int) -> None:
    order, flood = FairOrder(), Share("flood")
    waiting = sorted(order.tag(flood, 100) for _ in range(1000))
    order.served(waiting[500])
    assert order.tag(Share("small"), size) <= waiting[501]


def test_who_has_used_little_may_have_its_credit_at_once() -> None:
    order, flood, small = FairOrder(), Share("flood"), Share("small")
    order.credit = 300.0
    waiting = sorted(order.tag(flood, 100) for _ in range(1000))
    order.served(waiting[500])
    mine = [order.tag(small, 100) for _ in range(5)]
    assert [tag < waiting[501] for tag in mine] == [True, True, True, True, False]


def test_batch_jobs_come_after_all_interactive_requests() -> None:
    order = FairOrder()
    batch = order.tag(Share("a", priority=1), 1)
    assert all(order.tag(Share("b"), 10**6) < batch for _ in range(10))


@pytest.mark.parametrize("tenants", [1, 2, 4])
def test_floods_leave_room_for_one_more(tenants: int) -> None:
    held: Counter[str] = Counter()
    for number in range(10_000):
        share = Share(f"flood-{number % tenants}")
        if may_hold(share, held[share.tenant], 1, held.total(), 1000):
            held[share.tenant] += 1
    assert all(abs(count - 1000 / (tenants + 1)) <= 1 for count in held.values())
    assert may_hold(Share("new"), 0, 1, held.total(), 1000)


def test_without_tenants_the_queue_is_one() -> None:
    assert may_hold(Share(), 999, 1, 999, 1000)

"""Collections of garbage: when they were, and that real ones are seen."""

from __future__ import annotations

import gc

from deployments.telemetry.gauges.garbage import GarbageWatch

MS = 10**6


class Node:
    """Part of a circle, which only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_collections_of_a_millisecond_or_more_are_kept_by_time() -> None:
    now = [0]
    seen = GarbageWatch(lambda: now[0])
    for start, end in ((10, 15), (60, 60.5), (100, 110)):
        now[0] = round(start * MS)
        seen.note("start", {})
        now[0] = round(end * MS)
        seen.note("stop", {})
    assert seen.between_ns(0, 200 * MS) == 15 * MS
    assert seen.between_ns(40 * MS, 104 * MS) == 4 * MS
    assert seen.between_ns(40 * MS, 99 * MS) == 0
    # A request that is handled right after one may have arrived while nothing was read.
    assert seen.between_ns(16 * MS, 29 * MS) == 5 * MS
    assert seen.between_ns(131 * MS, 160 * MS) == 0


def test_a_collection_that_began_before_the_watch_is_no_pause() -> None:
    seen = GarbageWatch(lambda: 10**18)
    seen.note("stop", {})
    assert seen.between_ns(0, 2 * 10**18) == 0


def test_a_real_collection_is_seen_until_the_watch_ends() -> None:
    seen = GarbageWatch()
    seen.watch()
    try:
        nodes = [Node() for _ in range(200_000)]
        nodes.clear()
        gc.collect()
    finally:
        seen.close()
    took_ns = seen.between_ns(0, 2**62)
    assert took_ns > MS
    nodes = [Node() for _ in range(200_000)]
    nodes.clear()
    gc.collect()
    assert seen.between_ns(0, 2**62) == took_ns
    seen.close()

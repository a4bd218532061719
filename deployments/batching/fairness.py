"""Who is served next, and who may still queue, where several tenants share a device.

Order: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996). Each input gets a tag, the later of the queue's time
and the end of its tenant's previous input, in tokens over the tenant's weight; the lowest tag is served first, and the
queue's time is the tag of what was served last. Over any period, tenants that always have something queued get tokens
in proportion to their weights, within one input and the credit: who has used less than its share may have so many
tokens at once, before the others. With one tenant it is the order of arrival. Interactive requests are before those of
batch jobs, whoever sends them.

Room: dynamic thresholds (Choudhury, Hahne, IEEE/ACM ToN 1998). A tenant may hold as much of the queue as is free, times
its weight. One that floods the queue leaves half of it to others, two leave a third.
"""

from __future__ import annotations

from collections import defaultdict

from deployments.messages import Share

Order = tuple[int, float]
"""Priority and tag: the lowest is served first."""


class FairOrder:
    """Tags what is queued.

    Attributes:
        credit: tokens over weight.
    """

    def __init__(self) -> None:
        self.credit = 0.0
        self._now: dict[int, float] = defaultdict(float)
        self._ends: dict[tuple[int, str], float] = defaultdict(float)

    def tag(self, share: Share, tokens: int) -> Order:
        """The place of something that is queued now."""
        order = self.next_tag(share)
        self._ends[share.priority, share.tenant] = order[1] + tokens / share.weight
        return order

    def next_tag(self, share: Share) -> Order:
        """The place that ``tag`` would return."""
        earliest = self._now[share.priority] - self.credit
        return share.priority, max(earliest, self._ends[share.priority, share.tenant])

    def served(self, order: Order) -> None:
        """Note that what has this place is served now."""
        priority, start = order
        self._now[priority] = max(self._now[priority], start)


def may_hold(share: Share, held: int, more: int, total: int, most: int) -> bool:
    """Whether a tenant that holds ``held`` of a queue with ``total`` of at most ``most`` may add ``more``.

    Without a tenant, and for one that holds nothing, the queue's own limit is the only one.
    """
    return not share.tenant or not held or held + more <= share.weight * (most - total - more)

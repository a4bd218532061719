"""Decides what a language model computes in its next step. Pure: the cache and the clock are given to it.

1. A sequence is admitted in order of arrival, interactive ones before those of a batch job and tenants by their shares
   (see ``batching.fairness``), when the KV cache has room for its whole prompt and its reserve of the output
   (``kv_reserve``). With a reserve of 1 no sequence that runs can be out of room. Who cannot be admitted is not
   overtaken, so that a long prompt is not starved by short ones.
2. Every sequence that decodes takes part in every step. What prompts may add to the step is what its learned cost
   leaves of ``max_step_ms``, and at least as much again as decoding takes: where that is long, less would only make
   prompts wait. While nobody decodes, ``max_batch_tokens`` is the only limit.
3. Half of that goes to the oldest prompt, the rest to those with the least left: a short prompt does not wait for a
   long one, and a long one always advances.
4. With a smaller reserve, the cache can be full: then the newest sequence is preempted. It loses its keys and values,
   waits at the head of the queue (of its priority), and computes them again.
5. When a step failed, each of its sequences is computed again alone (``isolate``), until its next token is there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from deployments.batching.fairness import FairOrder, Order
from deployments.batching.generation.step_cost import StepCost
from deployments.messages import NOBODYS, Share

_OUTPUT = 10
"""Tokens of a prompt that a token of the output costs as much as, about."""
_LEAST_CHUNK = 16
"""Tokens of a prompt that a step computes even if it takes longer than it should."""
_WITH_PROMPTS = 2
"""How many times as long as decoding alone a step may take at least."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    max_sequences: int
    max_batch_tokens: int
    max_step_ms: float
    reserve: float


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence that is generated: one choice of one request."""

    number: int
    prompt: list[int]
    max_tokens: int
    share: Share = NOBODYS
    """Whose it is. The lower its priority, the earlier it is admitted and prefilled."""
    order: Order = (0, 0.0)
    """Its place among those that wait."""
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int = 0
    """Tokens of the prompt that were there when it was first admitted."""
    was_admitted: bool = False
    cache_since_ns: int = 0
    """Since when it could run, if the cache had room; 0 if it never had to wait for that."""
    is_suspect: bool = False
    """Whether a step that it was in failed, and no step has succeeded since."""

    @property
    def priority(self) -> int:
        return self.share.priority

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_prefilling(self) -> bool:
        """Whether it has computed less than all but its newest token."""
        return not self.generated or self.length - self.computed > 1

    def next_tokens(self, count: int) -> list[int]:
        """The next ``count`` tokens to compute."""
        begin, prompt = self.computed, len(self.prompt)
        if begin >= prompt:
            return self.generated[begin - prompt : begin - prompt + count]
        return (self.prompt[begin : begin + count] + self.generated[: max(0, begin + count - prompt)])[:count]


class Cache(Protocol):
    """The KV cache, as the engine holds it."""

    capacity: int
    """In tokens."""
    page: int
    """Tokens are stored in pages of this many."""

    def match(self, sequence: Sequence) -> int:
        """Give the sequence what is there of its prompt, and return how many tokens that is; never all of them."""
        ...

    def hold(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for the next ``tokens`` of the sequence. Returns False, and does nothing, if there is none."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Free everything that the sequence holds."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A sequence's part in a step."""

    sequence: Sequence
    tokens: int
    is_prefill: bool
    samples: bool
    """Whether its next token is chosen in this step."""


@dataclass(frozen=True, slots=True)
class Plan:
    members: tuple[Member, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def prefill_tokens(self) -> int:
        return sum(member.tokens for member in self.members if member.is_prefill)

    @property
    def decode_tokens(self) -> int:
        return sum(member.tokens for member in self.members if not member.is_prefill)


class StepPlanner:
    """Plans the steps of one replica. Used by one thread."""

    def __init__(self, limits: StepLimits, cache: Cache, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._limits, self._cache, self._clock = limits, cache, clock
        self.cost = StepCost()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """By admission, the oldest first."""
        self._order = FairOrder()

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._order.tag(sequence.share, len(sequence.prompt) + _OUTPUT * sequence.max_tokens)
        self.waiting.insert(sum(one.order <= sequence.order for one in self.waiting), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not wanted any more, and free its part of the cache."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def used_ratio(self) -> float:
        """Fraction of the cache that running sequences hold or have reserved."""
        return min(1.0, sum(map(self._reserved, self.running)) / self._capacity)

    def fits(self, prompt: int, max_tokens: int) -> bool:
        """Whether a sequence of this size can ever run."""
        return self._pages(prompt + max_tokens) <= self._capacity

    def plan(self) -> Plan:
        """Plan the next step; without members if there is nothing to do."""
        self._admit()
        preempted: list[Sequence] = []
        suspect = next((one for one in self.running if one.is_suspect), None)
        if suspect is not None:
            return self._plan_alone(suspect)
        decoding = [one for one in self.running if not one.is_prefilling]
        members = [Member(one, 1, False, True) for one in self._held(decoding, preempted)]
        budget = self._prefill_budget(len(members))
        for sequence, share in self._shares(budget):
            # Preemption must not take from those that decode for the sake of those that do not yet.
            tokens = min(share, sequence.length - sequence.computed)
            if tokens and self._cache.hold(sequence, tokens):
                samples = sequence.computed + tokens == sequence.length
                members.append(Member(sequence, tokens, True, samples))
        if not members and self.running:
            # Prompts alone have filled the cache.
            preempted.append(self._preempt())
            return Plan((), tuple(preempted))
        return Plan(tuple(members), tuple(preempted))

    def done(self, plan: Plan) -> None:
        """Note that the step has run."""
        for member in plan.members:
            member.sequence.computed += member.tokens
            if member.samples:
                member.sequence.is_suspect = False

    def isolate(self, sequences: Iterable[Sequence]) -> None:
        """Compute each of these again, alone."""
        for sequence in reversed(list(sequences)):
            sequence.is_suspect = True
            self.running.remove(sequence)
            self._requeue(sequence)

    # --- inside ---

    def _plan_alone(self, sequence: Sequence) -> Plan:
        tokens = min(self._limits.max_batch_tokens, sequence.length - sequence.computed)
        if not self._cache.hold(sequence, tokens):
            return Plan((), (self._preempt(),))
        samples = sequence.computed + tokens == sequence.length
        return Plan((Member(sequence, tokens, sequence.is_prefilling, samples),))

    @property
    def _capacity(self) -> int:
        return self._cache.capacity // self._cache.page

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._cache.page)

    def _reserved(self, sequence: Sequence) -> int:
        """Pages that it holds or may come to hold."""
        left = sequence.max_tokens - len(sequence.generated)
        # Without a full reserve, a page more lets it advance a little before somebody is preempted again.
        return self._pages(sequence.length + int(left * self._limits.reserve)) + (self._limits.reserve < 1)

    def _admit(self) -> None:
        reserved = sum(map(self._reserved, self.running))
        while self.waiting and len(self.running) < self._limits.max_sequences:
            sequence = self.waiting[0]
            reserved += self._reserved(sequence)
            if self.running and reserved > self._capacity:
                for one in self.waiting:
                    one.cache_since_ns = one.cache_since_ns or self._clock()
                return
            self.waiting.popleft()
            self._order.served(sequence.order)
            self.running.append(sequence)
            sequence.computed = self._cache.match(sequence)
            if not sequence.was_admitted:
                sequence.was_admitted, sequence.cached = True, sequence.computed

    def _held(self, decoding: list[Sequence], preempted: list[Sequence]) -> Iterator[Sequence]:
        """Yield those for whose next token there is room, preempting the newest as needed."""
        for sequence in decoding:
            while sequence in self.running and not self._cache.hold(sequence, 1):
                preempted.append(self._preempt())
            if sequence in self.running:
                yield sequence

    def _preempt(self) -> Sequence:
        sequence = self.running.pop()
        self._requeue(sequence)
        return sequence

    def _requeue(self, sequence: Sequence) -> None:
        self._cache.release(sequence)
        sequence.computed = 0
        self.waiting.insert(sum(one.priority < sequence.priority for one in self.waiting), sequence)

    def _prefill_budget(self, decoding: int) -> int:
        room = self._limits.max_batch_tokens - decoding
        if not decoding:
            return room
        limit_ns = max(self._limits.max_step_ms * 1e6, _WITH_PROMPTS * self.cost.estimate(decoding, 0))
        by_time = self.cost.prefill_tokens_within(limit_ns, decoding)
        return max(0, min(room, max(_LEAST_CHUNK, by_time)))

    def _shares(self, budget: int) -> Iterator[tuple[Sequence, int]]:
        prompts = [one for one in self.running if one.is_prefilling]
        for priority in sorted({one.priority for one in prompts}):
            for sequence, share in _shared([one for one in prompts if one.priority == priority], budget):
                yield sequence, share
                budget -= share


def _shared(prompts: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
    """Half of the budget for the oldest prompt, which is the first, the rest for those with the least left."""
    left = {one.number: one.length - one.computed for one in prompts}
    oldest, *others = prompts
    others.sort(key=lambda one: left[one.number])
    of_oldest = min(left[oldest.number], max(budget - sum(left[one.number] for one in others), -(-budget // 2)))
    for one, share in ((oldest, of_oldest), *((one, left[one.number]) for one in others)):
        if budget <= 0:
            return
        taken = min(budget, share)
        yield one, taken
        budget -= taken

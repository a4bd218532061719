"""Cost of a step of a language model, learned while serving."""

from __future__ import annotations

import numpy as np

_MEMORY, _GUESS_WEIGHT, _LEAST_FACTOR = 0.98, 0.1, 0.01


class StepCost:
    """Nanoseconds of a step of a language model: ``a + b * decoding sequences + c * prefilled tokens``.

    Learned by least squares of the relative errors, in which a step counts half as much as one that came 35 steps
    later, and the first guess as much as a tenth of a step: so the terms stay where they were as long as the steps do
    not tell them apart. (They often do not: prompts get what the estimate leaves of a step.)
    """

    def __init__(self, step_ns: float = 2e7, decode_ns: float = 2e6, prefill_ns: float = 1e6) -> None:
        self._start(step_ns, decode_ns, prefill_ns)

    def _start(self, *guess: float) -> None:
        self._guess = np.array(guess)
        self._terms = self._guess.tolist()
        self._products, self._sums = np.zeros((3, 3)), np.zeros(3)

    def fit(self, prefill_tokens: int, prefill_ns: float, decode_ns: float) -> None:
        """Initialise from two steps of the warm-up: a prompt of one sequence alone, and its next token."""
        beyond_ns = max(0.1 * prefill_ns, prefill_ns - decode_ns)
        self._start(0.9 * decode_ns, 0.1 * decode_ns, beyond_ns / prefill_tokens)

    def estimate(self, decoding: int, prefill_tokens: int) -> float:
        step, decode, prefill = self._terms
        return float(step + decode * decoding + prefill * prefill_tokens)

    def observe(self, decoding: int, prefill_tokens: int, took_ns: float) -> None:
        """Update the estimate from one step."""
        # In multiples of the guess, and relative to what the step took, all terms are of about the same size.
        shares = self._guess * (1, decoding, prefill_tokens) / max(took_ns, 1.0)
        self._products = _MEMORY * self._products + np.outer(shares, shares)
        self._sums = _MEMORY * self._sums + shares
        factors = np.linalg.solve(self._products + _GUESS_WEIGHT * np.eye(3), self._sums + _GUESS_WEIGHT)
        self._terms = (np.maximum(factors, _LEAST_FACTOR) * self._guess).tolist()

    def prefill_tokens_within(self, limit_ns: float, decoding: int) -> int:
        """How many tokens of prompts fit into a step that is to take no longer."""
        return int((limit_ns - self.estimate(decoding, 0)) / self._terms[2])

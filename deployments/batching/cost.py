"""Cost of a run of the model: ``a + b * padded tokens``, learned while serving.

``a`` is the fixed cost of any run (launches, Python, the smallest matrices), ``b`` the cost of each padded token. Both
are tracked by normalised least mean squares (Widrow and Hoff): the error of each run mainly adjusts the term that
contributed more to it, and no run adjusts either by more than a quarter, so that a single stall does not spoil the
estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

_STEP = 0.2
_REJECTION_DECAY = 0.95


class RunCost:
    """Nanoseconds of a run by its padded tokens (longest input, rounded as the engine pads, times inputs)."""

    def __init__(self, run_ns: float = 1e6, token_ns: float = 1e4) -> None:
        self.run_ns, self.token_ns = run_ns, token_ns

    def estimate(self, padded_tokens: int) -> float:
        return self.run_ns + self.token_ns * padded_tokens

    def observe(self, padded_tokens: int, took_ns: float) -> None:
        """Update the estimate from one run."""
        expected = self.estimate(padded_tokens)
        error = max(-1.0, min(1.0, (took_ns - expected) / expected))
        # The inputs of the filter are the shares of the two terms in the estimate; their squares normalise its step.
        of_run = self.run_ns / expected
        of_tokens = 1 - of_run
        step = _STEP * error / (of_run**2 + of_tokens**2)
        self.run_ns *= max(0.5, 1 + step * of_run)
        self.token_ns *= max(0.5, 1 + step * of_tokens)

    def fit(self, runs: Sequence[tuple[int, float]]) -> None:
        """Initialise from ``(padded tokens, nanoseconds)`` of warm-up runs, by least squares of the relative errors."""
        if len({tokens for tokens, _ in runs}) < 2:
            return
        weights = [1 / max(took, 1.0) ** 2 for _, took in runs]
        run_ns, self.token_ns = fit_line(runs, weights, least_slope=1.0)
        self.run_ns = max(1_000.0, run_ns)

    def decay_after_rejection(self) -> None:
        """Lower the estimate after it rejected an input, so that a wrong estimate does not reject inputs forever."""
        self.run_ns *= _REJECTION_DECAY
        self.token_ns *= _REJECTION_DECAY


def fit_line(
    points: Sequence[tuple[float, float]], weights: Sequence[float], *, least_slope: float = 0.0
) -> tuple[float, float]:
    """Fit ``y = a + b x`` to points ``(x, y)`` by weighted least squares, with ``b`` at least ``least_slope``.

    Returns ``(a, b)``. If all ``x`` are equal, ``b`` is ``least_slope``.
    """
    s0 = sx = sxx = sy = sxy = 0.0
    for (x, y), weight in zip(points, weights, strict=True):
        s0, sx, sxx = s0 + weight, sx + weight * x, sxx + weight * x**2
        sy, sxy = sy + weight * y, sxy + weight * x * y
    determinant = s0 * sxx - sx**2
    slope = (s0 * sxy - sx * sy) / determinant if determinant > 1e-9 * s0 * sxx else least_slope
    slope = max(least_slope, slope)
    return (sy - slope * sx) / s0, slope

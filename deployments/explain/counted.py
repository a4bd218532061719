"""What the processes counted in a window, read from Prometheus: true of all requests, however traces are sampled.

Metrics say how many and how slow, and how much telemetry was lost; traces say why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deployments.explain.traces.otlp import NOT_OTLP, printable
from deployments.explain.traces.servers.http_api import Api, SourceError
from deployments.explain.traces.weights import PERCENTILES
from deployments.telemetry import metrics
from deployments.telemetry.export.prometheus_names import LOST_BY_PROCESSES, LOST_BY_THE_COLLECTOR, series

_SCRAPE_S = 30
"""Two scrapes: counters of a window are seen this much later."""
_SHORTEST_S = 60


@dataclass(slots=True)
class Counted:
    """Counts of a window, by the processes' own counters.

    Attributes:
        url: of the Prometheus, without a password.
        outcomes: requests by ``outcome``, answered ones as ``ok``.
        latency_ms: percentiles of those that were answered; within a bucket they are interpolated.
        lost: spans and records that the processes, and the Collector, count as lost.
        seconds: length of the window that was asked for.
    """

    url: str
    outcomes: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    lost: int = 0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


def counter_at(url: str | None, model: str | None) -> Callable[[tuple[int, int], float], Counted] | None:
    """Return what asks this Prometheus what was counted in a window, of one model or of all; None if there is none.

    The window is in Unix nanoseconds, and the second argument the current time in seconds. Raises SourceError.
    """
    if url is None:
        return None
    # The token of the trace store is not for others.
    api = Api(url, token="SLOWLENS_METRICS_TOKEN")
    of_model = f'model="{_quoted(model)}"' if model is not None else ""

    def ask(window_ns: tuple[int, int], now_s: float) -> Counted:
        begin_s, end_s = window_ns[0] / 1e9, window_ns[1] / 1e9
        at_s = min(now_s, end_s + _SCRAPE_S)
        seconds = max(_SHORTEST_S, math.ceil(at_s - begin_s))
        found = Counted(api.url, seconds=end_s - begin_s)
        requests = f"{series(metrics.REQUESTS)}{{{of_model}}}"
        for labels, value in _query(api, f"sum by (outcome) ({_grown(requests, seconds)})", at_s):
            if round(value):
                found.outcomes[printable(labels.get("outcome", ""))] = round(value)
        answered = ",".join(filter(None, ['outcome="ok"', of_model]))
        buckets = f"sum by (le) ({_grown(f'{series(metrics.LATENCY)}_bucket{{{answered}}}', seconds)})"
        for name, share in PERCENTILES.items():
            for _, value in _query(api, f"histogram_quantile({share}, {buckets})", at_s):
                found.latency_ms[name] = round(value, 3)
        lost = [_grown(counter, seconds) for counter in LOST_BY_PROCESSES]
        lost += [_increased(counter, seconds) for counter in LOST_BY_THE_COLLECTOR]
        for counted in lost:
            found.lost += sum(round(value) for _, value in _query(api, f"sum ({counted})", at_s))
        return found

    return ask


def _grown(counter: str, seconds: int) -> str:
    """PromQL for what a counter of one process counted in the last seconds: all of it where it began then.

    ``increase`` extrapolates to the ends of the window, which is wrong for a burst. It is for counters that start anew
    under the same name; a process that starts anew has another.
    """
    before, within = f"{counter} offset {seconds}s", f"last_over_time({counter}[{seconds}s])"
    return f"clamp_min({within} - {before}, 0) or ({within} unless {before})"


def _increased(counter: str, seconds: int) -> str:
    """The same for a counter that may start anew."""
    before, within = f"{counter} offset {seconds}s", f"{counter}[{seconds}s]"
    return f"(increase({within}) and {before}) or (last_over_time({within}) unless {before})"


def _query(api: Api, query: str, at_s: float) -> list[tuple[dict[str, str], float]]:
    content = api.text("/api/v1/query", {"query": query, "time": f"{at_s:.3f}"})
    try:
        answer: Any = json.loads(content or "")
        result = answer["data"]["result"]
        values = [(dict(one["metric"]), float(one["value"][1])) for one in result]
    except NOT_OTLP:
        raise SourceError(f"{api.url} did not answer /api/v1/query as Prometheus does") from None
    return [(labels, value) for labels, value in values if math.isfinite(value)]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

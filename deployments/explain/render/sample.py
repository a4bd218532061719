"""What the numbers of a verdict are worth: of a sample, of a store that is late, beside what metrics counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deployments.explain.counted import Counted
from deployments.explain.traces.survey import Survey
from deployments.explain.traces.weights import PERCENTILES, Sample, interval_of, percentile
from deployments.explain.verdict import Verdict

_LATE_S = 30.0
ON_THEIR_WAY = "ours 10 s after the root has come, 70 s after the first span if the root is elsewhere"
_PERCENTILES = PERCENTILES | {"max": 1.0}


def percentiles(ascending: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The percentiles that are shown, of values that stand for one each or for as many as their weights say."""
    pairs = list(zip(ascending, weights or [1.0] * len(ascending), strict=True))
    return {name: round(percentile(pairs, share), 3) for name, share in _PERCENTILES.items()}


def intervals(survey: Survey) -> dict[str, tuple[float, float]]:
    """Where the percentiles of all requests lie, with 95 % confidence; empty if all were kept."""
    pairs = list(zip(survey.latencies_ms, survey.latency_weights, strict=True))
    if not survey.sample.variance or not pairs:
        return {}
    return {name: interval_of(pairs, share) for name, share in PERCENTILES.items()}


def of_a_sample(sample: Sample) -> str:
    """``estimated from the 412 whose traces were kept: 3,900 to 4,120 requests``."""
    least, most = sample.interval()
    between = f" ({least} to {most} requests, with 95% confidence)" if least < most else ""
    return f"estimated from the {sample.kept} whose traces were kept{between}"


def doubts(verdict: Verdict) -> Iterator[str]:
    """Yield what a reader has to know before the numbers: whether they are those of all requests."""
    sample = verdict.capture.survey.sample
    if sample.says_nothing:
        yield (
            f"these numbers are not of all requests: the ingress counted {sample.counted}, and the traces of "
            f"{sample.kept} are here. The others were sampled away or lost, and the kept do not say for how many they "
            "stand (th in tracestate, or ai.sampling.weight): counts, rates, percentiles and shares are those of the "
            "kept ones"
        )
    elif sample.missing:
        yield (
            f"of {sample.counted} requests that the ingress counted, the traces of about {sample.missing} are missing: "
            "lost, or still on their way"
        )
    if verdict.capture.cut:
        yield (
            f"these numbers are not of all requests: in {verdict.capture.cut} short periods the store had more traces "
            "than it returns at once; the others of these were not read"
        )
    if verdict.capture.late_s > _LATE_S:
        yield (
            f"the newest request here ended {verdict.capture.late_s:.0f} s ago; a Collector that samples passes a "
            f"trace on when it has decided ({ON_THEIR_WAY})"
        )


def sampling(verdict: Verdict) -> dict[str, Any]:
    """What the kept traces are of all requests."""
    survey = verdict.capture.survey
    sample = survey.sample
    return {
        "kept": sample.kept,
        "weights": "unknown" if sample.says_nothing else "known" if sample.is_sample else "none",
        "requests_interval": list(sample.interval()),
        "latency_ms_interval": {name: [round(ms, 3) for ms in both] for name, both in intervals(survey).items()},
        "counted": sample.counted,
        "missing": sample.missing,
        "periods_cut": verdict.capture.cut,
        "newest_s_ago": round(verdict.capture.late_s, 3),
    }


def by_metrics(found: Counted | None) -> Iterator[str]:
    """Yield a line with what metrics say of the window, if they were asked."""
    if found is None:
        return
    rate = f" ({found.requests / found.seconds:.1f}/s)" if found.seconds else ""
    failed = ", ".join(f"{count} {name}" for name, count in sorted(found.outcomes.items()) if name != "ok")
    shown = ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.latency_ms.items())
    yield (
        f"metrics of {found.url}: {found.requests} requests{rate}"
        + (f", of them {failed}" if failed else "")
        + (f"; {shown} of those answered" if shown else "")
        + f"; {found.lost} spans and records lost"
    )


def as_document(found: Counted | None) -> dict[str, Any]:
    """The same as ``metrics`` in JSON; empty if they were not asked."""
    if found is None:
        return {}
    return {
        "metrics": {
            "url": found.url,
            "requests": found.requests,
            "outcomes": found.outcomes,
            "latency_ms": found.latency_ms,
            "lost": found.lost,
        }
    }

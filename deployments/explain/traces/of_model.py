"""The traces of one model, where several share a store."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deployments.explain.traces.files import Source
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names


class NoSuchModel(Exception):
    """There are requests, but none of this model; the message names the others."""


class OfModel:
    """A ``Source`` that leaves out the requests, runs, loads and scaling decisions of other models.

    ``roots`` raises NoSuchModel.
    """

    def __init__(self, source: Source, model: str) -> None:
        self._source, self._model = source, model
        self._others: set[str] = set()
        """Traces of the requests of other models."""

    @property
    def broken(self) -> int:
        return self._source.broken

    @property
    def cut(self) -> int:
        return self._source.cut

    @property
    def is_server(self) -> bool:
        return self._source.is_server

    @property
    def lost(self) -> int:
        return self._source.lost

    def newest(self) -> str:
        return self._source.newest()

    def trace(self, trace_id: str) -> list[Span]:
        return self._source.trace(trace_id)

    def traces(self, trace_ids: Collection[str]) -> list[Span]:
        return self._source.traces(trace_ids)

    def linked(self, trace: list[Span]) -> list[Span]:
        return self._source.linked(trace)

    def roots(self, since_ns: int) -> Iterator[Root]:
        known, others, models = set[str](), set[str](), set[str]()
        for root in self._source.roots(since_ns):
            if root.model == self._model:
                known.add(root.key[0])
                yield root
            else:
                others.add(root.key[0])
                models.add(root.model)
        if not known and models:
            listed = ", ".join(sorted(repr(name) for name in models)[:20])
            raise NoSuchModel(f"there is no request of the model {self._model!r}; there are some of {listed}")
        self._others = others - known

    def spans(self, survey: Survey) -> Iterator[Span]:
        scalings, applications = list[Span](), set[str]()
        for span in self._source.spans(survey):
            if span.name == names.SCALING_DECISION:
                scalings.append(span)
            elif span.trace_id not in self._others and self._is_ours(span):
                if span.name in (names.BATCHED_PREDICT, names.GENERATE):
                    applications.add(_application(span))
                yield span
        yield from (one for one in scalings if one.attributes.get(names.AI_AUTOSCALING_APPLICATION) in applications)

    def _is_ours(self, span: Span) -> bool:
        """Of the spans in traces of their own, each names its model."""
        return bool(span.attributes.get(names.AI_MODEL_NAME, self._model) == self._model)


def _application(span: Span) -> str:
    """Of the replica that emitted it: Serve writes its id as ``SERVE_REPLICA::application#deployment#number``."""
    return span.instance.rpartition("::")[2].partition("#")[0]

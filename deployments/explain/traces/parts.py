"""A part of a trace store: the traces of one model, or of one Ray cluster, where several share it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

from deployments.explain.traces.files import Source
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names


class NoSuchPart(Exception):
    """There are requests, but none of this model or cluster; the message names the others."""


class _Part:
    """A ``Source`` that leaves out the requests of others. ``roots`` raises NoSuchPart."""

    what: ClassVar[str]

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name
        self._others: set[str] = set()
        """Traces of the requests of others."""

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
        known, others, names_of_others = set[str](), set[str](), set[str]()
        for root in self._source.roots(since_ns):
            name = self._name_of(root)
            if name == self._name:
                known.add(root.key[0])
                yield root
            else:
                others.add(root.key[0])
                names_of_others.add(name)
        if not known and names_of_others:
            listed = ", ".join(sorted(repr(name) for name in names_of_others)[:20])
            raise NoSuchPart(f"there is no request of the {self.what} {self._name!r}; there are some of {listed}")
        self._others = others - known

    def spans(self, survey: Survey) -> Iterator[Span]:
        raise NotImplementedError

    def _name_of(self, root: Root) -> str:
        raise NotImplementedError


class OfModel(_Part):
    """Without the requests, runs, loads and scaling decisions of other models."""

    what = "model"

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

    def _name_of(self, root: Root) -> str:
        return root.model

    def _is_ours(self, span: Span) -> bool:
        """Of the spans in traces of their own, each names its model."""
        return bool(span.attributes.get(names.AI_MODEL_NAME, self._name) == self._name)


class OfCluster(_Part):
    """Without what other Ray clusters sent: the old and the new one of an upgrade write into one store."""

    what = "cluster"

    def spans(self, survey: Survey) -> Iterator[Span]:
        # Callers' own spans are of no cluster.
        return (one for one in self._source.spans(survey) if one.cluster in ("", self._name))

    def _name_of(self, root: Root) -> str:
        return root.cluster


def _application(span: Span) -> str:
    """Of the replica that emitted it: Serve writes its id as ``SERVE_REPLICA::application#deployment#number``."""
    return span.instance.rpartition("::")[2].partition("#")[0]

"""Opens a trace source: files, or a server by its URL."""

from __future__ import annotations

from pathlib import Path

from deployments.explain.traces.files import Source, TraceFiles
from deployments.explain.traces.parts import OfCluster, OfModel
from deployments.explain.traces.servers.http_api import Api
from deployments.explain.traces.servers.jaeger import Jaeger, OlderJaeger
from deployments.explain.traces.servers.tempo import Tempo


def source_at(where: str, model: str | None = None) -> Source:
    """Open a file, a folder, a Jaeger query service or Tempo as a source, or one model's part of it.

    Two requests determine which server it is: Tempo has ``/api/echo``, Jaeger ``/api/v3/services``. Raises
    FileNotFoundError and SourceError.
    """
    return part_of(_source_at(where), model, None)


def part_of(source: Source, model: str | None, cluster: str | None) -> Source:
    """What a model and a Ray cluster have in a source; None is all of them."""
    if cluster is not None:
        source = OfCluster(source, cluster)
    return source if model is None else OfModel(source, model)


def _source_at(where: str) -> Source:
    if "://" not in where:
        return TraceFiles(Path(where))
    api = Api(where)
    if (api.text("/api/echo", {}) or "").strip() == "echo":
        return Tempo(api)
    return Jaeger(api) if '"services"' in (api.text("/api/v3/services", {}) or "") else OlderJaeger(api)

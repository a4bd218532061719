"""The verdict as a web page of the running application: a separate Serve application at ``/slowlens``.

It runs on the head node, whose local store it reads, and takes no resources from the deployments that
serve the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Response
from ray import serve
from ray.serve import Application

from deployments import __version__
from deployments.config import TelemetryConfig
from deployments.errors import ApiError, ConfigError, InvalidField, NotFound, QueueFull, SourceUnavailable
from deployments.explain.counted import counter_at
from deployments.explain.options import PageConfig, duration_s, share
from deployments.explain.render.html import as_html, content_security_policy
from deployments.explain.render.text import as_json
from deployments.explain.traces.open import source_at
from deployments.explain.traces.parts import NoSuchPart
from deployments.explain.traces.servers.http_api import SourceError
from deployments.explain.verdict import Verdict, examine
from deployments.http.keys import ApiKeys
from deployments.http.server import FastPathApp, error_response
from deployments.telemetry.export.provider import destination

Value = TypeVar("Value")
_Wanted = tuple[int, float, str | None]
"""Seconds, the share that counts as slow, and the model, None for all."""
_MAX_WAITING, _RETRY_S = 16, 5
_FORMS: dict[str, tuple[Callable[[Verdict], str], str]] = {
    "html": (as_html, "text/html"),
    "json": (as_json, "application/json"),
}
# The page is self-contained and loads nothing else.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{content_security_policy()}; frame-ancestors 'self'",
}


class DiagnosisPage:
    def __init__(self, config: PageConfig) -> None:
        self._config = config
        self._where = config.source or str(TelemetryConfig().store_directory())
        self._longest_s = max(duration_s(config.max_since), duration_s(config.since))
        self._reading = asyncio.Lock()
        self._waiting, self._rests_until_s = 0, 0.0
        self._last: tuple[_Wanted, float, Verdict] | None = None

    async def _page(
        self, since: str | None = None, slowest: str | None = None, format: str = "html", model: str | None = None
    ) -> Response:
        try:
            render, media_type = _known_form(format)
            wanted = (
                _asked(duration_s, "since", since or self._config.since),
                _asked(share, "slowest", slowest or self._config.slowest),
                model,
            )
            if wanted[0] > self._longest_s:
                raise InvalidField(f"since must be at most {self._config.max_since}", param="since")
            verdict = await self._verdict(wanted)
            return Response(await asyncio.to_thread(render, verdict), media_type=media_type, headers=_HEADERS)
        except ApiError as error:
            return error_response(error, error.body())

    async def _verdict(self, wanted: _Wanted) -> Verdict:
        """Run one reading at a time; a request that waited for one with the same parameters reuses its verdict.

        Whoever asks for what, reading takes at most a third of the time. Raises QueueFull.
        """
        if self._waiting >= _MAX_WAITING:
            raise QueueFull("too many wait for the traces to be read", retry_after_s=_RETRY_S)
        self._waiting += 1
        try:
            async with self._reading:
                now = time.monotonic()
                if self._last is not None and self._last[0] == wanted and now < self._last[1] + self._config.max_age_s:
                    return self._last[2]
                await asyncio.sleep(max(0.0, self._rests_until_s - now))
                began_s = time.monotonic()
                verdict = await asyncio.to_thread(self._read, *wanted)
                ended_s = time.monotonic()
                self._last, self._rests_until_s = (wanted, ended_s, verdict), ended_s + 2 * (ended_s - began_s)
                return verdict
        finally:
            self._waiting -= 1

    def _read(self, since_s: int, slowest: float, model: str | None) -> Verdict:
        try:
            count = counter_at(self._config.metrics, model)
            return examine(source_at(self._where, model), slowest, time.time_ns() - since_s * 10**9, count=count)
        except NoSuchPart as error:
            raise NotFound(str(error)) from None
        except (SourceError, FileNotFoundError) as error:
            raise SourceUnavailable(str(error)) from None

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastPathApp(
            {},
            ApiKeys(self._config.api_keys, "args.api_keys"),
            challenge='Basic realm="slowlens"',
            title="slowlens page",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
        )
        # With and without a slash after the route prefix.
        for path in ("", "/"):
            app.router.add_api_route(path, self._page, methods=["GET"])
        return app


def build(args: dict[str, Any]) -> Application:
    """Build the application from its ``args`` of serve_config.yaml. Raises ConfigError, naming the key."""
    config = PageConfig.parse(args)
    ApiKeys(config.api_keys, "args.api_keys")
    if config.source is None and destination("traces") != "store":
        raise ConfigError(
            "args.source: traces do not go to the local store here (see OTEL_EXPORTER_OTLP_ENDPOINT); set it to the "
            "URL of the Jaeger query service or the Tempo that stores them"
        )
    page = serve.deployment(
        name="Page",
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        num_replicas=1,
    )(serve.ingress()(DiagnosisPage))
    bound: Application = page.bind(config)
    return bound


def _known_form(name: str) -> tuple[Callable[[Verdict], str], str]:
    if name not in _FORMS:
        raise InvalidField(f"format must be one of {', '.join(_FORMS)}; got {name[:80]!r}", param="format")
    return _FORMS[name]


def _asked(parse: Callable[[str], Value], param: str, text: str) -> Value:
    try:
        return parse(text[:80])
    except ValueError as error:
        raise InvalidField(f"{param}: {error}", param=param) from None

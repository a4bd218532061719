"""Stage 1: receives the HTTP request, calls the stages in order and returns the response.

``_serve`` is the path of every request, top to bottom. The root span begins at its first line and ends with its
response.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypedDict

from fastapi import FastAPI, Request, Response
from ray.serve.handle import DeploymentHandle

from deployments import __version__
from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, ModelNotFound, NoReplicaReady
from deployments.http.headers import client_address, request_id_of, timeout_ms
from deployments.http.routes import ROUTES, Route, body_schema
from deployments.http.schemas import ParsedRequest
from deployments.http.server import FastPathApp, error_response, json_response, read_body
from deployments.http.server_timing import server_timing
from deployments.messages import (
    INPUT_COST_US,
    Postprocessed,
    PostprocessRequest,
    Predicted,
    PredictRequest,
    Tokenized,
    TokenizeRequest,
)
from deployments.stages.replica import Placement, prepare_replica
from deployments.telemetry.carrier import traceparent
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import RequestRecord
from deployments.transport.readiness import Readiness, running_replicas
from deployments.transport.stage_client import MAX_COST_US, StageClient

_logger = logging.getLogger("slowlens.ingress")
_CONTROLLER_TIMEOUT_S = 5.0
_TOKENIZER_COOLDOWN = 2.0


class _Common(TypedDict):
    """Arguments common to the clients of all stages."""

    telemetry: Telemetry
    readiness: Readiness
    no_replica_wait_ms: float


class IngressStage:
    """One replica of the ingress.

    Args:
        config: the application's configuration.
        tokenizer, model, postprocessor: handles of the other deployments.
        created_unix_s: when the application was built, for ``/v1/models``.
        placement: where this replica runs; by default obtained from Ray.
    """

    def __init__(
        self,
        config: AppConfig,
        tokenizer: DeploymentHandle[Any],
        model: DeploymentHandle[Any],
        postprocessor: DeploymentHandle[Any],
        created_unix_s: int,
        *,
        placement: Placement | None = None,
    ) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica()
        self._config, self._limits = config, config.limits
        self._card = ModelCard.load(config.model)
        self._created_unix_s = created_unix_s
        self._telemetry = Telemetry("ingress", config, self._card.name, placement.identity)
        self._readiness = Readiness(
            functools.partial(running_replicas, placement.app_name),
            {
                "tokenizer": tokenizer.deployment_name,
                "model": model.deployment_name,
                "postprocessor": postprocessor.deployment_name,
            },
        )
        self._meter = EventLoopMeter(started_s)
        common: _Common = {
            "telemetry": self._telemetry,
            "readiness": self._readiness,
            "no_replica_wait_ms": config.limits.no_replica_wait_ms,
        }
        # Requests that leave the first stage together stay together, so a cooldown at one stage is enough.
        self._tokenizer: StageClient[TokenizeRequest, Tokenized] = StageClient(
            "tokenizer",
            tokenizer,
            "tokenize",
            **common,
            cooldown_factor=_TOKENIZER_COOLDOWN,
            is_busy=lambda: self._meter.in_progress > 1,
        )
        # No more than fits in one run: the rest would wait in that replica even if others were idle.
        batch_us = min(MAX_COST_US, INPUT_COST_US * config.batching.max_batch_size)
        self._model: StageClient[PredictRequest, Predicted] = StageClient(
            "model", model, "predict", **common, replies_as_ready=True, max_cost_us=batch_us
        )
        self._postprocessor: StageClient[PostprocessRequest, Postprocessed] = StageClient(
            "postprocessor", postprocessor, "postprocess", **common
        )

    # --- the path of a request ---

    async def _serve(self, http: Request, route: Route) -> Response:
        request_id = request_id_of(http.headers)
        with self._telemetry.request(
            method=http.method,
            path=http.scope["path"],
            scheme=http.scope["scheme"],
            route=route.path,
            client=client_address(http),
            request_id=request_id,
            headers=http.headers,
        ) as record:
            try:
                body = await self._infer(http, route, record)
                record.status = 200
                response = Response(body, media_type="application/json")
            except asyncio.CancelledError as error:
                self._telemetry.fail(record, error)
                raise
            except Exception as error:
                response = self._failed(record, error)
            response.headers["traceresponse"] = traceparent(record.context)
            response.headers["Server-Timing"] = server_timing(record)
            return response

    async def _infer(self, http: Request, route: Route, record: RequestRecord) -> bytes:
        with self._telemetry.interval(record, "validate"):
            record.deadline_ns = record.started_ns + int(timeout_ms(http.headers, self._limits) * 1e6)
            record.operation = route.operation
            body = await read_body(http, self._limits.max_body_bytes, record.deadline_ns)
            request = route.parse(body, self._card, self._limits)
            self._describe(record, request)

        tokenized = await self._tokenizer.call(record, TokenizeRequest(request.inputs, request.truncate, request.param))
        record.tokens = sum(tokenized.ids.lengths)

        predicted = await self._model.call(record, PredictRequest(tokenized.ids, request.param))
        record.device, record.forward_ns = predicted.device, predicted.forward_ns

        texts = request.texts if self._card.task == "token-classification" else ()
        postprocessed = await self._postprocessor.call(
            record, PostprocessRequest(tokenized, predicted.outputs, request.options, texts)
        )

        with self._telemetry.interval(record, "respond"):
            return route.frame(postprocessed.fragments, self._card, record.tokens)

    def _describe(self, record: RequestRecord, request: ParsedRequest) -> None:
        record.requested_model = request.model
        record.input_count, record.input_length = len(request.inputs), sum(map(len, request.texts))
        if self._config.telemetry.capture_text:
            record.texts = request.texts

    def _failed(self, record: RequestRecord, error: Exception) -> Response:
        told = self._telemetry.fail(record, error)
        if not isinstance(error, ApiError):
            _logger.exception("request %s failed", record.request_id)
        body = told.body()
        if told.status == 500:
            trace_id = f"{record.context.trace_id:032x}"
            if trace_id not in told.message:
                body["error"]["message"] = f"{told.message}; trace id: {trace_id}"
        return error_response(told, body)

    # --- everything else over HTTP ---

    def _models(self) -> list[dict[str, Any]]:
        return [
            {
                "id": self._card.name,
                "object": "model",
                "created": self._created_unix_s,
                "owned_by": "slowlens",
            }
        ]

    async def _list_models(self) -> Response:
        return json_response({"object": "list", "data": self._models()})

    async def _show_model(self, model: str) -> Response:
        if model != self._card.name:
            error = ModelNotFound(
                f"the model {model[:80]!r} does not exist; served here: {self._card.name!r}", param="model"
            )
            return error_response(error, error.body())
        return json_response(self._models()[0])

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy. Requests in the ingress wait for other stages, not for it."""
        return replace(self._meter.report(), queue_depth=0, oldest_age_ms=0.0, queue_wait_ms=0.0).stats()

    async def _healthz(self) -> Response:
        missing = await self._readiness.missing(_CONTROLLER_TIMEOUT_S)
        if missing == []:
            return json_response({"status": "ok"})
        problem = "Serve's controller did not report which replicas are ready"
        if missing is not None:
            problem = f"no replica is ready: {', '.join(missing)}"
        unready = NoReplicaReady(problem, retry_after_s=5)
        return error_response(unready, unready.body())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the routes. Serve calls this once, after the constructor."""
        app = FastPathApp(
            {route.path: self._endpoint(route) for route in ROUTES},
            title="slowlens",
            version=__version__,
            description="Transformer inference that can tell you why a request was slow.",
        )
        for route in ROUTES:
            app.add_api_route(
                route.path,
                self._endpoint(route),
                methods=["POST"],
                openapi_extra=body_schema(route),
                summary=route.operation,
            )
        app.add_api_route("/v1/models", self._list_models, methods=["GET"], summary="The served model, as a list")
        app.add_api_route("/v1/models/{model:path}", self._show_model, methods=["GET"], summary="The served model")
        app.add_api_route("/healthz", self._healthz, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/healthz", self._healthz, methods=["GET"], summary="Whether every stage has a warm replica")
        return app

    def _endpoint(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            with self._meter.requests(1):
                return await self._serve(request, route)

        return endpoint

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()

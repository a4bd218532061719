"""Stage 1: receives the HTTP request, calls the stages in order and returns the response.

``_serve`` is the path of every request, top to bottom. The root span begins at its first line and ends with its
response.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from ray.serve.handle import DeploymentHandle

from deployments import __version__
from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, ModelNotFound, NoReplicaReady
from deployments.http.bodies import ARRIVED, Body, BodyBudget
from deployments.http.front import Front
from deployments.http.headers import client_address, request_id_of, timeout_ms
from deployments.http.keys import ApiKeys
from deployments.http.server import Endpoint, FastPathApp, RetryAdvice, error_response, json_response
from deployments.http.server_timing import server_timing
from deployments.messages import (
    Postprocessed,
    PostprocessRequest,
    Predicted,
    PredictRequest,
    Share,
    Tokenized,
    TokenizeRequest,
)
from deployments.protocols.errors import ErrorForm, openai_error
from deployments.protocols.fields import Answered, Framed, Incoming, ParsedRequest, check_model
from deployments.protocols.generation import ParsedGeneration
from deployments.protocols.open_inference.rest import path_params
from deployments.protocols.routes import OPEN_INFERENCE, ROUTES, body_schema
from deployments.stages.open_inference import OpenInference
from deployments.stages.replica import Placement, Stoppable, prepare_replica, tune_garbage_collector
from deployments.telemetry.carrier import traceparent
from deployments.telemetry.names import Service
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import RequestRecord
from deployments.telemetry.sampling.retention import Keep
from deployments.transport.discovery import Directory, ServeDirectory
from deployments.transport.stage_client import StageClient

_STAGES: tuple[Service, ...] = ("tokenizer", "model", "postprocessor")
_logger = logging.getLogger("slowlens.ingress")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the ingresses of several models in one process have in common."""

    telemetry: Telemetry
    meter: EventLoopMeter
    models: tuple[str, ...] = ()


class IngressStage(OpenInference, Stoppable):
    """One replica of the ingress. Must be made on the event loop that it runs on.

    Args:
        config: the application's configuration.
        tokenizer, model, postprocessor: handles of the other deployments.
        created_unix_s: when the application was built, for ``/v1/models``.
        placement: where this replica runs; by default obtained from Ray.
        directory: says which replicas the deployment of a handle has.
        shared: what it has in common with the ingresses of other models in its process, if there are any.

    Attributes:
        results: types of what the three other stages return.
    """

    results: ClassVar[tuple[type[Any], ...]] = (Tokenized, Predicted, Postprocessed)
    _http_infer: ClassVar[Any] = OPEN_INFERENCE

    def __init__(
        self,
        config: AppConfig,
        tokenizer: DeploymentHandle[Any],
        model: DeploymentHandle[Any],
        postprocessor: DeploymentHandle[Any],
        created_unix_s: int,
        *,
        placement: Placement | None = None,
        directory: Callable[[DeploymentHandle[Any]], Directory] = ServeDirectory,
        shared: Shared | None = None,
    ) -> None:
        started_s = time.monotonic()
        self._config, self._limits = config, config.limits
        self._card = ModelCard.load(config.model)
        self._created_unix_s = created_unix_s
        self._owns_telemetry = shared is None
        if shared is None:
            placement = placement or prepare_replica(has_channel=False)
            shared = Shared(
                Telemetry("ingress", config, self._card.name, placement.identity), EventLoopMeter(started_s)
            )
        self._telemetry, self._meter = shared.telemetry, shared.meter
        self._card = replace(self._card, beside=tuple(name for name in shared.models if name != self._card.name))
        self._advice, self._front = RetryAdvice(), Front()
        self._bodies, self._keys = BodyBudget(config.limits), ApiKeys(config.security.api_keys)
        self._tokenizer, self._model, self._postprocessor = (
            StageClient[Any, Any](stage, directory(handle), result, self._telemetry, config.limits.no_replica_wait_ms)
            for stage, handle, result in zip(_STAGES, (tokenizer, model, postprocessor), self.results, strict=True)
        )
        self._replica_sets = {
            "tokenizer": self._tokenizer.replicas,
            "model": self._model.replicas,
            "postprocessor": self._postprocessor.replicas,
        }
        for replicas in self._replica_sets.values():
            replicas.on_keep = self._telemetry.keep
            replicas.start()
        self.infer_endpoint = self.endpoint(self._http_infer)
        self._is_open = True

    # --- the path of a request ---

    async def _serve(self, http: Request, route: Any, _: Any) -> Response | None:
        with self._record(http, route.path) as record, self._bodies.body(http) as body:

            async def read() -> Incoming:
                return Incoming(await body.read(record.deadline_ns), http.headers, http.path_params)

            try:
                framed: Framed = await self._infer(route, record, http.headers, read)
                record.status = 200
                self._advice.served(record.caller)
                response = Response(framed.body, media_type=framed.media_type, headers=dict(framed.headers))
            except asyncio.CancelledError as error:
                self._telemetry.fail(record, error)
                raise
            except Exception as error:
                response = self._failed(record, error, body, route.error)
            response.headers["traceresponse"] = traceparent(record.context)
            response.headers["Server-Timing"] = self._timing(record)
            return response

    def _timing(self, record: RequestRecord) -> str:
        return server_timing(record)

    def _record(self, http: Request, path: str) -> AbstractContextManager[RequestRecord]:
        return self._telemetry.request(
            method=http.method,
            path=http.scope["path"],
            scheme=http.scope["scheme"],
            route=path,
            client=client_address(http.headers, http.client.host if http.client is not None else ""),
            request_id=request_id_of(http.headers),
            headers=http.headers,
            front_ns=self._front.elapsed_ns(http.headers),
            model=self._card.name,
            arrived_ns=http.scope.get(ARRIVED, 0),
        )

    async def _infer(
        self, route: Any, record: RequestRecord, headers: Mapping[str, str], read: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Take a request through the stages, and return the response as its route frames it.

        Args:
            headers: of HTTP, or the metadata of gRPC.
            read: returns what the route parses.
        """
        with self._telemetry.interval(record, "validate"):
            share = self._admitted(route, record, headers)
            request = route.parse(await read(), self._card, self._limits)
            share = self._apply_fields(record, request, share, headers)
            self._describe(record, request)

        tokenized: Tokenized = await self._tokenizer.call(
            record,
            TokenizeRequest(
                inputs=request.inputs,
                truncate=request.truncate,
                param=request.param,
                tenant=share.tenant,
                query=request.query,
                describes=request.describes,
                adds_special_tokens=request.adds_special_tokens,
                types=request.types,
            ),
        )
        record.tokens = sum(tokenized.ids.lengths)
        if not route.runs_model:
            with self._telemetry.interval(record, "respond"):
                return route.frame(Answered(request, self._card, tokenized, Postprocessed(())))

        predicted: Predicted = await self._model.call(record, PredictRequest(tokenized.ids, request.param, share))
        record.device, record.forward_ns = predicted.device, predicted.forward_ns

        needs_texts = request.options.wants_texts or self._card.task == "token-classification"
        postprocessed: Postprocessed = await self._postprocessor.call(
            record,
            PostprocessRequest(tokenized, predicted.outputs, request.options, request.texts if needs_texts else ()),
        )

        with self._telemetry.interval(record, "respond"):
            return route.frame(Answered(request, self._card, tokenized, postprocessed))

    def _admitted(self, route: Any, record: RequestRecord, headers: Mapping[str, str]) -> Share:
        """Refuse, before the body is read, who has no key or would be refused later anyway."""
        self._set_deadline(record, timeout_ms(headers, self._limits))
        record.operation = route.operation
        share = self._keys.share_of(headers)
        record.tenant = share.tenant
        if route.runs_model:
            self._model.refuse_early(record.deadline_ns, share)
        return share

    def _set_deadline(self, record: RequestRecord, timeout: float) -> None:
        record.deadline_ns = record.started_ns + int(timeout * 1e6)
        record.timeout_ms = timeout if timeout != self._limits.default_timeout_ms else None

    def _apply_fields(
        self,
        record: RequestRecord,
        request: ParsedRequest | ParsedGeneration,
        share: Share,
        headers: Mapping[str, str],
    ) -> Share:
        """What the body says of the deadline and of the priority, where its API has fields for them."""
        if request.timeout_ms is not None:
            timeout = {"x-request-timeout-ms": str(request.timeout_ms)}
            self._set_deadline(record, min(timeout_ms(timeout, self._limits), timeout_ms(headers, self._limits)))
        if request.priority is not None:
            return self._keys.share_of({**headers, "x-priority": request.priority})
        return share

    def _describe(self, record: RequestRecord, request: ParsedRequest) -> None:
        record.requested_model = request.model
        record.input_count, record.input_length = len(request.inputs), request.characters
        if self._config.telemetry.capture_text:
            record.texts = request.texts if request.query is None else (request.query, *request.texts)

    def _failed(self, record: RequestRecord, error: Exception, body: Body, form: ErrorForm = openai_error) -> Response:
        told = self._told(record, error)
        record.status, content = form(told)
        response = error_response(told, content, record.status)
        if body.was_left:
            response.headers["Connection"] = "close"
        return response

    def _told(self, record: RequestRecord, error: Exception) -> ApiError:
        """Record that a request failed, and return what its caller is told."""
        told = self._telemetry.fail(record, error)
        if told.retry_after_s is not None:
            arrived_s = record.started_ns / 1e9
            told.retry_after_s = self._advice.for_refused(record.caller, told.retry_after_s, arrived_s)
        if not isinstance(error, ApiError):
            _logger.exception("request %s failed", record.request_id)
        trace_id = f"{record.context.trace_id:032x}"
        if told.status == 500 and trace_id not in told.message:
            told.message = f"{told.message}; trace id: {trace_id}"
        return told

    # --- everything else over HTTP ---

    @property
    def card(self) -> ModelCard:
        return self._card

    def listed(self) -> dict[str, Any]:
        """The model, as OpenAI lists it."""
        return {"id": self._card.name, "object": "model", "created": self._created_unix_s, "owned_by": "slowlens"}

    async def _list_models(self) -> Response:
        return json_response({"object": "list", "data": [self.listed()]})

    async def _show_model(self, model: str) -> Response:
        try:
            check_model(model, self._card)
        except ModelNotFound as error:
            return error_response(error, error.body())
        return json_response(self.listed())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for the autoscaling policy."""
        return self._meter.report_of_ingress().stats()

    async def _healthz(self) -> Response:
        unready = self.unready()
        return json_response({"status": "ok"}) if unready is None else error_response(unready, unready.body())

    def unready(self) -> NoReplicaReady | None:
        """Why no request could be served, if that is so."""
        missing = [stage for stage, replicas in self._replica_sets.items() if not replicas.is_ready]
        return NoReplicaReady(f"no replica is ready: {', '.join(missing)}", retry_after_s=5) if missing else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the routes. Serve calls this once, after the constructor."""
        app = FastPathApp(
            {route.path: self.endpoint(route) for route in self.routes()},
            self._keys,
            find=self._find,
            title="slowlens",
            version=__version__,
            description="Transformer inference that can tell you why a request was slow.",
        )
        for route in (*self.routes(), self._http_infer):
            app.document(route.path, openapi_extra=body_schema(route), summary=route.operation)
        self._add_open_inference(app)
        app.add_api_route("/v1/models", self._list_models, methods=["GET"], summary="The served model, as a list")
        app.add_api_route("/v1/models/{model:path}", self._show_model, methods=["GET"], summary="The served model")
        app.add_api_route("/healthz", self._healthz, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/healthz", self._healthz, methods=["GET"], summary="Whether every stage has a warm replica")
        return app

    def routes(self) -> Sequence[Any]:
        """Those that a request for inference may take, by their path."""
        return ROUTES

    def serves(self, route: Any) -> bool:
        """Whether a route is for models of this task."""
        return self._card.task in route.tasks

    def _find(self, path: str) -> tuple[Endpoint, Mapping[str, str]] | None:
        """The route whose path contains the model's name."""
        params = path_params(path)
        return (self.infer_endpoint, params) if params is not None else None

    def endpoint(self, route: Any) -> Endpoint:
        """What handles the requests of a route."""

        async def endpoint(request: Request, send: Any) -> Response | None:
            with self._meter.requests(1):
                return await self._serve(request, route, send)

        return endpoint

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve once, when the replica is ready. Nobody needs to know anything of it."""
        self._telemetry.watch_loop()
        self._telemetry.tell(self.keep)
        tune_garbage_collector()
        return {}

    def keep(self, kept: Sequence[Keep]) -> None:
        """Tell the stages which traces are kept."""
        for replicas in self._replica_sets.values():
            replicas.keep(kept)

    async def _stop(self) -> None:
        """End the connections to the other stages, and stop. Serve has waited for the last request."""
        if self._owns_telemetry and self._telemetry.is_retroactive:
            # The last decisions have to reach the stages.
            self._telemetry.flush()
            await asyncio.sleep(0)
        for replicas in self._replica_sets.values():
            await replicas.close()
        if self._owns_telemetry:
            self._telemetry.close()

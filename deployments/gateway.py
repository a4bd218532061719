"""One address for several models: a Serve application that takes each request to the application of its model.

It is an ingress of each of them, in one process: a request goes from here straight to the stages of its model, and its
trace looks the same. The model is what the body names as ``model``, as OpenAI's clients do, or what the path names in
the Open Inference Protocol; a request that names none goes to the only model that serves its route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments import __version__
from deployments.app import deployment
from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig, LimitsConfig, Section
from deployments.engine.card import ModelCard
from deployments.errors import ConfigError, InvalidField, ModelNotFound, NoReplicaReady, Unauthorized
from deployments.http.bodies import BodyBudget
from deployments.http.keys import ApiKeys
from deployments.http.peek import look_into
from deployments.http.server import Endpoint, FastPathApp, error_response, json_response
from deployments.protocols.embeddings_inference import info
from deployments.protocols.open_inference.metadata import SERVER
from deployments.protocols.open_inference.rest import path_params
from deployments.protocols.routes import OPEN_INFERENCE, body_schema
from deployments.stages.generation.ingress import GenerationIngressStage
from deployments.stages.ingress import IngressStage, Shared
from deployments.stages.replica import Placement, Stoppable, prepare_replica, tune_garbage_collector
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.sampling.retention import Keep
from deployments.transport.discovery import Directory, ServeDirectory

_STAGES = ("Tokenizer", "Model", "Postprocessor")
Handles = Callable[[str, str], DeploymentHandle[Any]]


class GatewayConfig(Section):
    """``args`` of the application."""

    applications: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="By the names of the applications that serve the models: their `args`, repeated (YAML: `*name`).",
    )

    def parsed(self) -> dict[str, AppConfig]:
        """Raises ConfigError if an application's ``args`` are invalid, or two serve models of the same name."""
        found, names = dict[str, AppConfig](), dict[str, str]()
        for application, args in self.applications.items():
            try:
                found[application] = AppConfig.parse(args)
                name = ModelCard.load(found[application].model).name
            except ConfigError as error:
                raise ConfigError(f"args.applications.{application}: {error}") from None
            if name in names:
                raise ConfigError(
                    f"args.applications: {names[name]} and {application} serve models of the same name, {name!r}; set "
                    "args.model.name of one"
                )
            names[name] = application
        return found


class _Named(msgspec.Struct):
    """Of a body, the model."""

    model: Any = None


_NAMED = msgspec.json.Decoder(_Named)


class _AnyKeys(ApiKeys):
    """The keys of several applications: each opens what does not belong to one of them."""

    def __init__(self, each: Sequence[ApiKeys]) -> None:
        super().__init__(None)
        self._each = each

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized."""
        refused: Unauthorized | None = None
        for keys in self._each:
            try:
                keys.check(headers)
                return
            except Unauthorized as error:
                refused = error
        if refused is not None:
            raise refused

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether ``check`` raises nothing."""
        try:
            self.check(headers)
        except Unauthorized:
            return False
        return True


class GatewayStage(Stoppable):
    """One replica of the gateway. Must be made on the event loop that it runs on.

    Args:
        config: which applications there are.
        created_unix_s: when it was built, for ``/v1/models``.
        placement: where this replica runs; by default obtained from Ray.
        handles: the handle of an application's deployment.
        directory: says which replicas the deployment of a handle has.
    """

    def __init__(
        self,
        config: GatewayConfig,
        created_unix_s: int,
        *,
        placement: Placement | None = None,
        handles: Handles | None = None,
        directory: Callable[[DeploymentHandle[Any]], Directory] = ServeDirectory,
    ) -> None:
        started_s = time.monotonic()
        placement = placement or prepare_replica(has_channel=False)
        configs = config.parsed()
        cards = {application: ModelCard.load(one.model) for application, one in configs.items()}
        first = next(iter(configs.values()))
        models = tuple(card.name for card in cards.values())
        self._telemetry = Telemetry("ingress", first, "", placement.identity, models=models)
        self._meter = EventLoopMeter(started_s)
        shared = Shared(self._telemetry, self._meter, models)
        self._ingresses: dict[str, IngressStage] = {}
        """By model."""
        for application, one in configs.items():
            kind = GenerationIngressStage if cards[application].task == "text-generation" else IngressStage
            tokenizer, model, postprocessor = ((handles or _handle)(stage, application) for stage in _STAGES)
            self._ingresses[cards[application].name] = kind(
                one, tokenizer, model, postprocessor, created_unix_s, directory=directory, shared=shared
            )
        self._limits = LimitsConfig(
            max_body_bytes=max(one.limits.max_body_bytes for one in configs.values()),
            max_held_body_bytes=max(one.limits.max_held_body_bytes for one in configs.values()),
            body_timeout_ms=min(one.limits.body_timeout_ms for one in configs.values()),
        )
        self._bodies = BodyBudget(self._limits)
        self._infos = {cards[application].name: info(one, cards[application]) for application, one in configs.items()}
        self._keys = _AnyKeys([ApiKeys(one.security.api_keys) for one in configs.values()])
        self._is_open = True

    # --- where a request goes ---

    def _endpoint(self, path: str) -> Endpoint:
        """What takes requests of a path to the ingress of their model."""
        every = {
            name: route for name, ingress in self._ingresses.items() for route in ingress.routes() if route.path == path
        }
        # If it is for none of the models, they say what it is for.
        routes = {name: route for name, route in every.items() if self._ingresses[name].serves(route)} or every
        endpoints = {name: self._ingresses[name].endpoint(route) for name, route in routes.items()}
        first = next(iter(routes))
        needs_model = self._ingresses[first].endpoint(replace(routes[first], parse=_needs_model(tuple(routes))))

        async def endpoint(request: Request, send: Any) -> Response | None:
            if len(endpoints) == 1 or not self._keys.allow(request.headers):
                return await endpoints[first](request, send)
            request, body = await look_into(request, self._bodies, self._limits)
            model = _model_of(body)
            chosen = needs_model if model is None else endpoints.get(model, endpoints[first])
            return await chosen(request, send)

        return endpoint

    def _find(self, path: str) -> tuple[Endpoint, Mapping[str, str]] | None:
        params = path_params(path)
        return (self._of(params["model"]).infer_endpoint, params) if params is not None else None

    def _of(self, model: str) -> IngressStage:
        """The ingress of a model; of an unknown one the first, which says so."""
        return self._ingresses.get(model) or next(iter(self._ingresses.values()))

    # --- over gRPC ---

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._of(request.model_name).ModelInfer(request, grpc_context)

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._of("").ServerLive(request, grpc_context)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._least_ready().ServerReady(request, grpc_context)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._of(request.name).ModelReady(request, grpc_context)

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._of("").ServerMetadata(request, grpc_context)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._of(request.name).ModelMetadata(request, grpc_context)

    # --- everything else over HTTP ---

    def _readiest(self) -> IngressStage:
        """One that is ready, if any is: a model that scales from zero does not make the others unhealthy."""
        return min(self._ingresses.values(), key=lambda ingress: ingress.unready() is not None)

    async def _healthz(self) -> Response:
        states = {name: _state(ingress.unready()) for name, ingress in self._ingresses.items()}
        unready = self._readiest().unready()
        if unready is None:
            return json_response({"status": "ok", "models": states})
        return error_response(unready, unready.body())

    def _least_ready(self) -> IngressStage:
        """The Open Inference Protocol's server is ready when all its models are."""
        return max(self._ingresses.values(), key=lambda ingress: ingress.unready() is not None)

    async def _ready(self) -> Response:
        is_ready = self._least_ready().unready() is None
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    async def _live(self) -> Response:
        return json_response({"live": True})

    async def _list_models(self) -> Response:
        return json_response({"object": "list", "data": [one.listed() for one in self._ingresses.values()]})

    async def _show_model(self, model: str) -> Response:
        if model in self._ingresses:
            return json_response(self._ingresses[model].listed())
        listed = ", ".join(map(repr, self._ingresses))
        error = ModelNotFound(f"the model {model[:80]!r} does not exist; served here: {listed}", param="model")
        return error_response(error, error.body())

    async def _server_metadata(self) -> Response:
        return json_response(SERVER)

    async def _model_ready(self, model: str, version: str = "") -> Response:
        return await self._of(model).model_ready(model, version)

    async def _model_metadata(self, model: str, version: str = "") -> Response:
        return await self._of(model).show_metadata(model, version)

    async def _info(self) -> Response:
        return json_response({"models": list(self._infos.values())})

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the routes. Serve calls this once, after the constructor."""
        routes = {route.path: route for ingress in self._ingresses.values() for route in ingress.routes()}
        app = FastPathApp(
            {path: self._endpoint(path) for path in routes},
            self._keys,
            find=self._find,
            title="slowlens",
            version=__version__,
            description="Transformer inference that can tell you why a request was slow.",
        )
        for route in (*routes.values(), OPEN_INFERENCE):
            app.document(route.path, openapi_extra=body_schema(route), summary=route.operation)
        versioned = "/v2/models/{model:path}/versions/{version}"
        for path, endpoint, summary in (
            ("/v1/models", self._list_models, "The served models"),
            ("/v1/models/{model:path}", self._show_model, "A served model"),
            ("/v2", self._server_metadata, "The server, as the Open Inference Protocol tells it"),
            ("/v2/", self._server_metadata, "The same"),
            ("/v2/health/live", self._live, "Whether the gateway runs"),
            ("/v2/health/ready", self._ready, "Whether all models are ready"),
            (f"{versioned}/ready", self._model_ready, "Whether a model is ready"),
            (versioned, self._model_metadata, "A model's tensors"),
            ("/v2/models/{model:path}/ready", self._model_ready, "Whether a model is ready"),
            ("/v2/models/{model:path}", self._model_metadata, "A model's tensors"),
            ("/info", self._info, "The models, as text-embeddings-inference tells of one"),
            ("/healthz", self._healthz, "Whether a model is ready; which ones are"),
        ):
            app.add_api_route(path, endpoint, methods=["GET"], summary=summary)
        app.add_api_route("/healthz", self._healthz, methods=["HEAD"], include_in_schema=False)
        return app

    # --- what Serve calls ---

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy."""
        return self._meter.report_of_ingress().stats()

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Once, when the replica is ready."""
        self._telemetry.watch_loop()
        self._telemetry.tell(self._keep)
        tune_garbage_collector()
        return {}

    def _keep(self, kept: Sequence[Keep]) -> None:
        for ingress in self._ingresses.values():
            ingress.keep(kept)

    async def _stop(self) -> None:
        if self._telemetry.is_retroactive:
            self._telemetry.flush()
            await asyncio.sleep(0)
        for ingress in self._ingresses.values():
            await ingress.close()
        self._telemetry.close()


class ServedGateway(GatewayStage):
    """As Serve runs it: it awaits the destructor of an ingress only if that is a coroutine function."""

    async def __del__(self) -> None:
        await self.close()


def build(args: dict[str, Any]) -> Application:
    """Build the application from its ``args`` of serve_config.yaml. Raises ConfigError, naming the key."""
    config = GatewayConfig.parse(args)
    first, *_ = config.parsed().values()
    gateway = deployment("Ingress", serve.ingress()(ServedGateway), first, num_cpus=0.2)
    bound: Application = gateway.bind(config, int(time.time()))
    return bound


def _handle(stage: str, application: str) -> DeploymentHandle[Any]:
    # The application may be deployed after this one.
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(stage, application, _check_exists=False)
    return handle


def _needs_model(models: Sequence[str]) -> Callable[..., Any]:
    """A route's ``parse`` for requests that name no model where several serve the route."""

    def parse(*_: Any) -> Any:
        raise InvalidField(f"model is required: {', '.join(map(repr, models))} serve this route", param="model")

    return parse


def _model_of(body: bytes) -> str | None:
    """None if it names none, or is no JSON object."""
    try:
        model = _NAMED.decode(body).model
    except msgspec.MsgspecError:
        return None
    return model if isinstance(model, str) else None


def _state(unready: NoReplicaReady | None) -> str:
    return "ok" if unready is None else unready.message

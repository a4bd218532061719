"""The Open Inference Protocol in the ingress: its gRPC methods, and its HTTP routes besides inference.

Serve calls the gRPC methods, by their names (``grpc_options`` of serve_config.yaml). An error is a status code and
details, set on the context: Serve would log what is raised here, with its stack.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import grpc
from fastapi import FastAPI, Response

from deployments.autoscaling.meters import EventLoopMeter
from deployments.config import AppConfig, LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, InvalidField, NoReplicaReady
from deployments.http.front import Front
from deployments.http.headers import client_address, request_id_of, timeout_ms
from deployments.http.keys import ApiKeys
from deployments.http.server import RetryAdvice, error_response, json_response
from deployments.protocols.embeddings_inference import info
from deployments.protocols.errors import open_inference_error
from deployments.protocols.open_inference import protobuf, rpc
from deployments.protocols.open_inference.metadata import SERVER, model_metadata
from deployments.protocols.open_inference.service import TIME_LEFT
from deployments.protocols.open_inference.tensors import check_served
from deployments.protocols.routes import MODEL_INFER
from deployments.telemetry.carrier import traceparent
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import RequestRecord

_SHORTEST_MS = 0.001


class OpenInference:
    """Part of the ingress, see ``IngressStage``."""

    _card: ModelCard
    _config: AppConfig
    _limits: LimitsConfig
    _keys: ApiKeys
    _telemetry: Telemetry
    _meter: EventLoopMeter
    _front: Front
    _advice: RetryAdvice
    _model_infer: ClassVar[Any] = MODEL_INFER
    """The route of gRPC's inference."""

    async def _infer(
        self, route: Any, record: RequestRecord, headers: Mapping[str, str], read: Callable[[], Awaitable[Any]]
    ) -> Any:
        raise NotImplementedError

    def _timing(self, record: RequestRecord) -> str:
        raise NotImplementedError

    def _told(self, record: RequestRecord, error: Exception) -> ApiError:
        raise NotImplementedError

    def unready(self) -> NoReplicaReady | None:
        raise NotImplementedError

    # --- inference over gRPC ---

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        headers = self._headers(grpc_context)
        with self._meter.requests(1), self._call(request, headers, grpc_context) as record:

            async def read() -> Any:
                return request

            try:
                answer = await self._infer(self._model_infer, record, headers, read)
                record.status, record.rpc_status = 200, grpc.StatusCode.OK.name
                self._advice.served(record.caller)
            except asyncio.CancelledError as error:
                self._telemetry.fail(record, error)
                record.rpc_status = grpc.StatusCode.CANCELLED.name
                raise
            except Exception as error:
                told = self._told(record, error)
                record.rpc_status = rpc.status_of(told).name
                answer = _refuse(grpc_context, told, "ModelInfer")
                self._trail(grpc_context, record, told)
            else:
                self._trail(grpc_context, record)
            return answer

    def _trail(self, context: Any, record: RequestRecord, error: ApiError | None = None) -> None:
        """Send what HTTP responses have in their headers."""
        trailing = [
            ("x-request-id", record.request_id),
            ("traceresponse", traceparent(record.context)),
            ("server-timing", self._timing(record)),
        ]
        if error is not None and error.retry_after_s is not None:
            trailing.append(("retry-after", str(error.retry_after_s)))
        context.set_trailing_metadata(trailing)

    def _call(self, request: Any, headers: Mapping[str, str], context: Any) -> Any:
        return self._telemetry.request(
            method="POST",
            path=f"/{rpc.INFER}",
            scheme="http",
            route=rpc.INFER,
            client=client_address(headers, _peer(context)),
            # The protocol has an id too.
            request_id=request_id_of({"x-request-id": request.id, **headers}),
            headers=headers,
            front_ns=self._front.elapsed_ns(headers),
            rpc_method=rpc.INFER,
            model=self._card.name,
        )

    def _headers(self, context: Any) -> dict[str, str]:
        """The call's metadata, in which its own deadline is the timeout, if it is the earlier one."""
        headers = _metadata(context)
        left_ms = headers.pop(TIME_LEFT, None)
        if left_ms is not None:
            # A timeout that is none is told by whoever reads it next.
            with contextlib.suppress(InvalidField):
                timeout = min(timeout_ms(headers, self._limits), max(float(left_ms), _SHORTEST_MS))
                headers["x-request-timeout-ms"] = str(timeout)
        return headers

    # --- the other methods ---

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002, N802
        return _response("ServerLive", live=True)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: ARG002, N802
        return _response("ServerReady", ready=self.unready() is None)

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._tell("ModelReady", request, grpc_context, lambda: {"ready": self.unready() is None})

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._tell("ServerMetadata", request, grpc_context, lambda: SERVER)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._tell("ModelMetadata", request, grpc_context, lambda: model_metadata(self._card))

    def _tell(self, method: str, request: Any, context: Any, fields: Callable[[], Mapping[str, Any]]) -> Any:
        """Answer who has a key, and, where the method names a model, means this one."""
        try:
            self._keys.check(_metadata(context))
            if method != "ServerMetadata":
                check_served(request.name, request.version, self._card)
            return _response(method, **fields())
        except ApiError as error:
            return _refuse(context, error, method)

    # --- over HTTP ---

    def _add_open_inference(self, app: FastAPI) -> None:
        """Routes of the protocol besides inference, and text-embeddings-inference's ``/info``."""
        for path, endpoint, summary in (
            ("/v2", self._server_metadata, "The server, as the Open Inference Protocol tells it"),
            ("/v2/", self._server_metadata, "The same"),
            ("/v2/health/live", self._live, "Whether the ingress runs"),
            ("/v2/health/ready", self._ready, "Whether every stage has a warm replica"),
            ("/v2/models/{model:path}/versions/{version}/ready", self.model_ready, "Whether the model is ready"),
            ("/v2/models/{model:path}/versions/{version}", self.show_metadata, "The model's tensors"),
            ("/v2/models/{model:path}/ready", self.model_ready, "Whether the model is ready"),
            ("/v2/models/{model:path}", self.show_metadata, "The model's tensors"),
            ("/info", self._info, "The model, as text-embeddings-inference tells it"),
        ):
            app.add_api_route(path, endpoint, methods=["GET"], summary=summary)

    async def _server_metadata(self) -> Response:
        return json_response(SERVER)

    async def _live(self) -> Response:
        return json_response({"live": True})

    async def _ready(self) -> Response:
        is_ready = self.unready() is None
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    async def model_ready(self, model: str, version: str = "") -> Response:
        is_ready = self.unready() is None
        body = {"name": model, "ready": is_ready}
        return self._of_model(model, version, lambda: json_response(body, 200 if is_ready else 503))

    async def show_metadata(self, model: str, version: str = "") -> Response:
        return self._of_model(model, version, lambda: json_response(model_metadata(self._card)))

    def _of_model(self, model: str, version: str, respond: Callable[[], Response]) -> Response:
        try:
            check_served(model, version, self._card)
            return respond()
        except ApiError as error:
            status, body = open_inference_error(error)
            return error_response(error, body, status)

    async def _info(self) -> Response:
        return json_response(info(self._config, self._card))


def _metadata(context: Any) -> dict[str, str]:
    """What was sent with a call, as headers of HTTP."""
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def _peer(context: Any) -> str:
    """``ipv4:10.0.0.1:5000`` and ``ipv6:[::1]:5000`` as addresses."""
    kind, _, address = (context.peer() or "").partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _response(method: str, **fields: Any) -> Any:
    return protobuf.METHODS[method][1](**fields)


def _refuse(context: Any, error: ApiError, method: str) -> Any:
    """Set the status; what is returned beside it is not read."""
    context.set_code(rpc.status_of(error))
    context.set_details(rpc.details_of(error, error.message))
    return _response(method)

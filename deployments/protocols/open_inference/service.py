"""The gRPC service, as ``grpc_options.grpc_servicer_functions`` of serve_config.yaml names it.

Serve replaces what a method does by a call of the ingress deployment's method of the same name, and passes it the
metadata of the call, but not its deadline. So each method is wrapped once more, to add the time that is left to the
metadata.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from deployments.protocols.open_inference import protobuf

TIME_LEFT = "slowlens-time-left-ms"
"""Metadata: the time until the caller's deadline, in milliseconds, when the call arrived."""


def add_GRPCInferenceServiceServicer_to_server(servicer: Any, server: Any) -> None:  # noqa: N802
    """Register the service, under the name that generated code gives to such a function."""
    protobuf.make_known()
    service: Any = grpc.method_handlers_generic_handler(
        protobuf.SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(servicer, name),
                request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, (request, response) in protobuf.METHODS.items()
        },
    )
    server.add_generic_rpc_handlers((service,))
    # By now Serve has put its own handlers there. They are looked up here at each call.
    handlers: dict[str, Any] = service._method_handlers  # noqa: SLF001
    for path, handler in handlers.items():
        handlers[path] = handler._replace(unary_unary=_with_time_left(handler.unary_unary))


def _with_time_left(call: Callable[[Any, Any], Awaitable[bytes]]) -> Callable[[Any, Any], Awaitable[bytes]]:
    async def called(request: Any, context: Any) -> bytes:
        return await call(request, _Context(context))

    return called


class _Context:
    """A call's context, with the time that is left in its metadata; a caller's own word for it is left out."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        sent = [(key, value) for key, value in self._context.invocation_metadata() or () if key != TIME_LEFT]
        left_s = self._context.time_remaining()
        return sent if left_s is None else [*sent, (TIME_LEFT, f"{max(left_s, 0.0) * 1e3:.3f}")]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

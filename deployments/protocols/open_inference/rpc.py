"""The protocol over gRPC: messages to requests, results to messages, errors to status codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import ApiError, InvalidField, TooLarge
from deployments.messages import OutputTensor, TensorOption
from deployments.protocols.fields import Answered, ParsedRequest
from deployments.protocols.open_inference import protobuf
from deployments.protocols.open_inference.tensors import (
    VERSION,
    InferRequest,
    InputTensor,
    check_texts,
    from_raw,
    parse_infer,
    text_of,
)

INFER = f"{protobuf.SERVICE}/ModelInfer"
"""``rpc.method`` of an inference."""
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_of(error: ApiError) -> grpc.StatusCode:
    return _STATUS.get(error.status, grpc.StatusCode.INTERNAL)


def details_of(error: ApiError, message: str) -> str:
    """The error's code, for programs, and what it says."""
    return f"{error.code}: {message}"


def parse_rpc(message: Any, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Parse a ``ModelInferRequest``. Raises ModelNotFound, InvalidField or TooLarge."""
    return parse_infer(request_of(message, limits), card, limits)


def request_of(message: Any, limits: LimitsConfig) -> InferRequest:
    """Raises InvalidField or TooLarge."""
    size = message.ByteSize()
    if size > limits.max_body_bytes:
        raise TooLarge(f"the message has {size} bytes; at most {limits.max_body_bytes} are allowed")
    outputs = [TensorOption(one.name, True) for one in message.outputs]
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id[:256],
        parameters=_parameters(message.parameters),
        inputs=_inputs(message),
        outputs=outputs or None,
        are_raw=True,
    )


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param") for name, value in parameters.items()
    }


def _inputs(message: Any) -> list[InputTensor]:
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidField(
            f"raw_input_contents has {len(raw)} elements for {len(message.inputs)} inputs", param="raw_input_contents"
        )
    return [
        InputTensor(one.name, one.datatype, tuple(one.shape), _values(one, raw[i] if raw else None))
        for i, one in enumerate(message.inputs)
    ]


def _values(one: Any, raw: bytes | None) -> Any:
    if raw is not None:
        return from_raw(one.name, one.datatype, raw)
    if one.datatype == "BYTES":
        check_texts(one.name, len(one.contents.bytes_contents))
        return [text_of(one.name, value) for value in one.contents.bytes_contents]
    if one.datatype == "INT64":
        return np.array(one.contents.int64_contents, dtype=np.int64)
    # What it is not is said where the model's inputs are known.
    return []


def frame_rpc(answered: Answered) -> Any:
    return framed(answered.card, answered.request.response_id, answered.postprocessed.tensors)


def framed(card: ModelCard, response_id: str, tensors: Sequence[OutputTensor]) -> Any:
    """The ``ModelInferResponse`` with these tensors, each in ``raw_output_contents``."""
    response = protobuf.METHODS["ModelInfer"][1](model_name=card.name, model_version=VERSION, id=response_id)
    for one in tensors:
        response.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
        response.raw_output_contents.append(one.data)
    return response

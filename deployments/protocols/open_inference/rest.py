"""The protocol over HTTP: JSON, and the extension that sends tensors as bytes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field
from pydantic_core import to_json

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import InvalidField
from deployments.messages import OutputTensor, TensorOption
from deployments.protocols.fields import Answered, Body, Framed, Incoming, ParsedRequest, parse, shown
from deployments.protocols.open_inference.tensors import VERSION, InferRequest, InputTensor, from_raw, parse_infer

HEADER_LENGTH = "Inference-Header-Content-Length"
"""How many bytes of the body are JSON, if bytes of tensors follow it."""


class InputBody(Body):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = Field(None, description="`binary_data_size`: bytes behind the JSON.")
    data: list[Any] | None = Field(None, description="Its elements, flat or nested.")


class OutputBody(Body):
    name: str
    parameters: dict[str, Any] | None = Field(None, description="`binary_data`: whether to return it as bytes.")


class InferBody(Body):
    id: str | None = Field(None, max_length=256)
    parameters: dict[str, Any] | None = None
    inputs: list[InputBody]
    outputs: list[OutputBody] | None = None


def parse_rest(incoming: Incoming, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    return parse_infer(request_of(incoming), card, limits)


def request_of(incoming: Incoming) -> InferRequest:
    """Raises InvalidJson or InvalidField."""
    header, binary = _split(incoming)
    body = parse(InferBody, header)
    parameters = dict(body.parameters or {})
    are_raw = _flag(parameters.pop("binary_data_output", False), "parameters.binary_data_output")
    return InferRequest(
        model=incoming.path_params["model"],
        version=incoming.path_params.get("version") or "",
        id=body.id or "",
        parameters=parameters,
        inputs=_inputs(body, binary),
        outputs=[_output(one, are_raw) for one in body.outputs] if body.outputs else None,
        are_raw=are_raw,
    )


def _split(incoming: Incoming) -> tuple[bytes, memoryview]:
    stated = incoming.headers.get(HEADER_LENGTH)
    if stated is None:
        return incoming.body, memoryview(b"")
    length = int(stated) if stated.isascii() and stated.isdecimal() and len(stated) < 19 else -1
    if not 0 < length <= len(incoming.body):
        raise InvalidField(
            f"{HEADER_LENGTH} must be a number of bytes, at most the {len(incoming.body)} of the body; got "
            f"{stated[:80]!r}",
            param=HEADER_LENGTH,
        )
    return incoming.body[:length], memoryview(incoming.body)[length:]


def _inputs(body: InferBody, binary: memoryview) -> list[InputTensor]:
    tensors, start = [], 0
    for one in body.inputs:
        size = (one.parameters or {}).get("binary_data_size")
        if size is None:
            tensors.append(InputTensor(one.name, one.datatype, tuple(one.shape), _values(one)))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary) - start:
            raise InvalidField(
                f"binary_data_size of the input {shown(one.name)} must be a number of bytes, at most the "
                f"{len(binary) - start} that are left behind the JSON; got {shown(size)}",
                param="inputs",
            )
        values = from_raw(one.name, one.datatype, binary[start : start + size])
        tensors.append(InputTensor(one.name, one.datatype, tuple(one.shape), values))
        start += size
    if start != len(binary):
        raise InvalidField(f"{len(binary) - start} bytes behind the JSON belong to no input", param="inputs")
    return tensors


def _values(one: InputBody) -> Any:
    if one.data is None:
        raise InvalidField(f"the input {shown(one.name)} has no data", param="inputs")
    flat = _flat(one.data)
    if one.datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise InvalidField(f"the input {shown(one.name)} must consist of strings", param="inputs")
        return flat
    if not all(isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 for value in flat):
        raise InvalidField(f"the input {shown(one.name)} must consist of integers", param="inputs")
    return np.array(flat, dtype=np.int64)


def _flat(data: list[Any]) -> list[Any]:
    """The elements row by row. Lists may be nested as deep as a tensor has dimensions."""
    for _ in range(2):
        if not any(isinstance(one, list) for one in data):
            return data
        data = [part for one in data for part in (one if isinstance(one, list) else [one])]
    return data


def _output(one: OutputBody, are_raw: bool) -> TensorOption:
    parameters = dict(one.parameters or {})
    is_raw = _flag(parameters.pop("binary_data", are_raw), "binary_data")
    if any(parameters.values()):
        raise InvalidField(
            f"outputs: {next(iter(parameters))[:80]} is not supported; known: binary_data", param="outputs"
        )
    return TensorOption(one.name, is_raw)


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidField(f"{param} must be true or false; got {shown(value)}", param=param)
    return value


def frame_rest(answered: Answered) -> Framed:
    request = answered.request
    return framed(answered.card, request.response_id, request.options.tensors, answered.postprocessed.tensors)


def framed(
    card: ModelCard, response_id: str, options: Sequence[TensorOption], tensors: Sequence[OutputTensor]
) -> Framed:
    """The response with these tensors, each as its option wants it."""
    head: dict[str, Any] = {"model_name": card.name, "model_version": VERSION}
    if response_id:
        head["id"] = response_id
    outputs = [_output_of(one, is_raw=option.is_raw) for one, option in zip(tensors, options, strict=True)]
    header = b'%b,"outputs":[%b]}' % (to_json(head)[:-1], b",".join(outputs))
    if not any(option.is_raw for option in options):
        return Framed(header)
    binary = b"".join(one.data for one, option in zip(tensors, options, strict=True) if option.is_raw)
    return Framed(header + binary, "application/octet-stream", {HEADER_LENGTH: str(len(header))})


def _output_of(one: OutputTensor, *, is_raw: bool) -> bytes:
    head: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
    if is_raw:
        return to_json({**head, "parameters": {"binary_data_size": len(one.data)}})
    return b'%b,"data":[%b]}' % (to_json(head)[:-1], one.data)


def path_params(path: str) -> Mapping[str, str] | None:
    """The model, and its version if there is one, of an ``/infer`` path; None for another."""
    if not (path.startswith("/v2/models/") and path.endswith("/infer")):
        return None
    model, slash, version = path.removeprefix("/v2/models/").removesuffix("/infer").rpartition("/versions/")
    return {"model": model, "version": version} if slash else {"model": version, "version": ""}

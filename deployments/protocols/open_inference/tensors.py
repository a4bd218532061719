"""An inference request of the protocol, whatever carried it, and what the stages need of it.

A model's input tensors are the texts, or the token ids with an optional mask that tells padding from tokens; its output
tensors are in ``engine.outputs.tensors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.engine.outputs.tensors import TensorSpec, output_specs
from deployments.errors import InvalidField, ModelNotFound, TooLarge
from deployments.messages import OutputOptions, TensorOption
from deployments.protocols.fields import ParsedRequest, checked_inputs, checked_text, served, shown
from deployments.protocols.openai import check_dimensions, check_top_k

VERSION = "1"
"""Of every model: there is one at a time."""
TEXT, IDS, MASK, QUERY, TEXTS = "text", "input_ids", "attention_mask", "query", "texts"
TYPES = "token_type_ids"
_MAX_NAME = 80
_MAX_TEXTS = 65_536
"""In one tensor, before they are decoded: limits.max_inputs is below it."""
PRIORITIES = ("interactive", "batch")


def input_specs(card: ModelCard) -> tuple[TensorSpec, ...]:
    """The input tensors of a model: either the texts or the token ids, with what belongs to them."""
    if card.task == "text-generation":
        return TensorSpec(TEXT, "BYTES", (1,)), TensorSpec(IDS, "INT64", (1, -1))
    ids = TensorSpec(IDS, "INT64", (-1, -1)), TensorSpec(MASK, "INT64", (-1, -1))
    if card.task == "text-ranking":
        texts = TensorSpec(QUERY, "BYTES", (1,)), TensorSpec(TEXTS, "BYTES", (-1,))
        return *texts, *ids, *((TensorSpec(TYPES, "INT64", (-1, -1)),) if card.token_types > 1 else ())
    return TensorSpec(TEXT, "BYTES", (-1,)), *ids


@dataclass(frozen=True, slots=True)
class InputTensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[str] | npt.NDArray[np.int64]
    """Flat: texts, or integers."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    model: str
    version: str
    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[InputTensor]
    outputs: Sequence[TensorOption] | None
    """None: all."""
    are_raw: bool
    """How outputs are returned if none are named."""


def check_served(model: str, version: str, card: ModelCard) -> None:
    """Raises ModelNotFound."""
    if model != card.name:
        raise ModelNotFound(f"the model {shown(model)} does not exist; served here: {served(card)}", param="model_name")
    if version not in ("", VERSION):
        raise ModelNotFound(
            f"model {card.name!r} has no version {shown(version)}; its version is {VERSION!r}", param="model_version"
        )


def parse_infer(request: InferRequest, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises ModelNotFound, InvalidField or TooLarge."""
    check_served(request.model, request.version, card)
    given = by_name(request.inputs, card)
    outputs = wanted_outputs(request, card)
    parameters = dict(request.parameters)
    truncate = take(parameters, "truncate", bool, True)
    top_k = take(parameters, "top_k", int, None, least=1)
    dimensions = take(parameters, "dimensions", int, None, least=1)
    normalize = take(parameters, "normalize", bool, True)
    raw_scores = take(parameters, "raw_scores", bool, False)
    timeout_us = take(parameters, "timeout", int, None, least=0)
    priority = take_priority(parameters)
    check_all_taken(parameters, "dimensions, normalize, priority, raw_scores, timeout, top_k, truncate")
    check_top_k(top_k, card, "parameters.top_k")
    check_dimensions(dimensions, card)
    inputs, query, types = _inputs(given, card, limits)
    param = TEXTS if query is not None else IDS if IDS in given else TEXT
    options = OutputOptions(
        "/v2", top_k=top_k, dimensions=dimensions, normalize=normalize, raw_scores=raw_scores, tensors=outputs
    )
    return ParsedRequest(
        inputs,
        param,
        truncate,
        options,
        card.name,
        query=query,
        types=types,
        timeout_ms=timeout_us / 1e3 if timeout_us else None,
        priority=priority,
        response_id=request.id,
    )


# --- inputs ----------------------------------------------------------------------------------------------------------


def by_name(inputs: Sequence[InputTensor], card: ModelCard) -> dict[str, InputTensor]:
    """Check names, datatypes and shapes."""
    specs = {spec.name: spec for spec in input_specs(card)}
    given: dict[str, InputTensor] = {}
    for one in inputs:
        spec = specs.get(one.name)
        if spec is None:
            raise InvalidField(
                f"model {card.name!r} has no input {shown(one.name)}; it has {', '.join(specs)}", param="inputs"
            )
        if one.name in given:
            raise InvalidField(f"the input {one.name!r} is there twice", param="inputs")
        if one.datatype != spec.datatype:
            raise InvalidField(
                f"the input {one.name!r} must have the datatype {spec.datatype}; got {shown(one.datatype)}",
                param="inputs",
            )
        _check_shape(one, spec)
        given[one.name] = one
    return given


def _check_shape(one: InputTensor, spec: TensorSpec) -> None:
    shape = list(one.shape)
    # A column of texts is taken for a list of them: so clients send them to models that batch.
    is_column = spec.datatype == "BYTES" and len(shape) == 2 and shape[1] == 1
    told = str(shape[:4])[:_MAX_NAME]
    if any(size < 0 for size in shape) or (len(shape) != len(spec.shape) and not is_column):
        raise InvalidField(f"the input {one.name!r} must have the shape {list(spec.shape)}; got {told}", param="inputs")
    if prod(shape) != len(one.values):
        raise InvalidField(
            f"the input {one.name!r} has the shape {told}, and {len(one.values)} elements are there", param="inputs"
        )


def _inputs(
    given: Mapping[str, InputTensor], card: ModelCard, limits: LimitsConfig
) -> tuple[Any, str | None, tuple[tuple[int, ...], ...]]:
    """The inputs; what they are compared with by a cross-encoder; of token ids, their types."""
    others = [name for name in given if name in (TEXT, QUERY, TEXTS)]
    if IDS in given:
        if others:
            raise InvalidField(f"send the input {others[0]!r} or {IDS!r}, not both", param="inputs")
        ids, types = _rows(given)
        return checked_inputs(ids, IDS, limits, tokens_allowed=True), None, types
    if MASK in given or TYPES in given:
        raise InvalidField(f"the inputs {MASK!r} and {TYPES!r} need {IDS!r}", param="inputs")
    if card.task == "text-ranking":
        query = needed(given, QUERY)
        if len(query.values) != 1:
            raise InvalidField(f"the input {QUERY!r} must have one element; got {len(query.values)}", param=QUERY)
        texts = checked_inputs(list(needed(given, TEXTS).values), TEXTS, limits, tokens_allowed=False)
        return texts, checked_text(query.values[0], QUERY, QUERY, "a string", limits), ()
    return checked_inputs(list(needed(given, TEXT).values), TEXT, limits, tokens_allowed=False), None, ()


def needed(given: Mapping[str, InputTensor], name: str) -> InputTensor:
    if name not in given:
        raise InvalidField(f"the input {name!r} is required", param="inputs")
    return given[name]


def _rows(given: Mapping[str, InputTensor]) -> tuple[list[list[int]], tuple[tuple[int, ...], ...]]:
    """Token ids by input, without padding, and their types, if there are some."""
    for other in (MASK, TYPES):
        if other in given and given[other].shape != given[IDS].shape:
            raise InvalidField(f"the inputs {IDS!r} and {other!r} must have the same shape", param=other)
    arrays = {name: np.asarray(one.values).reshape(one.shape) for name, one in given.items()}
    if TYPES in arrays and not np.isin(arrays[TYPES], (0, 1)).all():
        raise InvalidField(f"the input {TYPES!r} must consist of zeros and ones", param=TYPES)
    rows, size = arrays[IDS].shape
    lengths = arrays[MASK].sum(axis=1) if MASK in arrays else np.full(rows, size)
    if MASK in arrays and not np.array_equal(arrays[MASK], np.arange(size) < lengths[:, None]):
        raise InvalidField(f"the input {MASK!r} must have ones, and then zeros, in each row", param=MASK)
    cut = {
        name: [row[:length].tolist() for row, length in zip(arrays[name], lengths.tolist(), strict=True)]
        for name in (IDS, TYPES)
        if name in arrays
    }
    return cut[IDS], tuple(map(tuple, cut.get(TYPES, ())))


# --- outputs and parameters -------------------------------------------------------------------------------------------


def wanted_outputs(request: InferRequest, card: ModelCard) -> tuple[TensorOption, ...]:
    names = [spec.name for spec in output_specs(card)]
    if request.outputs is None:
        return tuple(TensorOption(name, request.are_raw) for name in names)
    for one in request.outputs:
        if one.name not in names:
            raise InvalidField(
                f"model {card.name!r} has no output {shown(one.name)}; it has {', '.join(names)}", param="outputs"
            )
    return tuple(request.outputs)


def check_all_taken(parameters: Mapping[str, Any], known: str) -> None:
    """Raises InvalidField."""
    if parameters:
        unknown = next(iter(parameters))
        raise InvalidField(f"parameters.{unknown[:_MAX_NAME]} is not known; known: {known}", param="parameters")


def take(parameters: dict[str, Any], name: str, kind: type, default: Any, *, least: float | None = None) -> Any:
    """Remove a parameter and return it. Raises InvalidField if it is of another type, or too small."""
    value = parameters.pop(name, default)
    if value is default:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_of_kind = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    is_of_kind = is_of_kind and (kind is not int or -(2**63) <= value < 2**63)
    if not is_of_kind or (least is not None and not least <= value < 2**31):
        more = "" if least is None else f", {least:g} or more"
        rule = {bool: "true or false", int: f"an integer{more}", float: f"a number{more}"}[kind]
        raise InvalidField(f"parameters.{name} must be {rule}; got {shown(value)}", param=f"parameters.{name}")
    return value


def take_priority(parameters: dict[str, Any]) -> str | None:
    """As in X-Priority, or as Triton numbers them: 0 for none, 1 for the highest."""
    value: Any = parameters.pop("priority", None)
    if value is None or value in PRIORITIES:
        return value  # type: ignore[no-any-return]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return None if value == 0 else PRIORITIES[min(value, 2) - 1]
    raise InvalidField(
        f"parameters.priority must be {' or '.join(PRIORITIES)}, or a number; got {shown(value)}",
        param="parameters.priority",
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def from_raw(name: str, datatype: str, data: bytes | memoryview) -> Sequence[str] | npt.NDArray[np.int64]:
    """Decode the bytes of an input tensor. Raises InvalidField."""
    if datatype == "INT64":
        if len(data) % 8:
            raise InvalidField(f"the input {shown(name)} has {len(data)} bytes, no multiple of 8", param="inputs")
        return np.frombuffer(data, dtype="<i8")
    if datatype == "BYTES":
        return [text_of(name, part) for part in _parts(name, data)]
    raise InvalidField(
        f"the input {shown(name)} has the datatype {shown(datatype)}; BYTES and INT64 are supported", param="inputs"
    )


def check_texts(name: str, count: int) -> None:
    """Raises TooLarge."""
    if count > _MAX_TEXTS:
        raise TooLarge(f"the input {shown(name)} has {count} elements or more; at most {_MAX_TEXTS} are read")


def text_of(name: str, data: bytes | memoryview) -> str:
    """Raises InvalidField."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InvalidField(f"the input {shown(name)} must be UTF-8", param="inputs") from None


def _parts(name: str, data: bytes | memoryview) -> list[memoryview]:
    """Each element follows its length in four bytes."""
    view, start, parts = memoryview(data), 0, []
    while start < len(view):
        end = start + 4 + int.from_bytes(view[start : start + 4], "little")
        if start + 4 > len(view) or end > len(view):
            raise InvalidField(f"the input {shown(name)} ends within an element", param="inputs")
        parts.append(view[start + 4 : end])
        check_texts(name, len(parts))
        start = end
    return parts

"""HTTP bodies: validation of requests, field by field, and framing of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import to_json

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.engine.protocol import MAX_FILLS
from deployments.errors import InvalidField, InvalidJson, ModelNotFound, TooLarge
from deployments.messages import OutputOptions

Parsed = TypeVar("Parsed", bound="Body")
_SHOWN_CHARS = 80
"""Maximum characters of a client's value shown in a message, because messages also go into telemetry."""
Inputs = tuple[str, ...] | tuple[tuple[int, ...], ...]
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS, _TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}]}


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EmbeddingsBody(Body):
    """OpenAI's embeddings request. ``user`` is accepted but not used."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="A string, a list of strings, a list of token ids, or a list of such lists."
    )
    model: str | None = Field(None, description="The served model; optional.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Keep only this many leading dimensions, normalised again."
    )
    user: str | None = None


class Parameters(Body):
    truncate: bool = Field(True, description="Truncate inputs that are too long; if false, reject them.")
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Labels (text-classification) or tokens (fill-mask, at most 100) to return."
    )


class PredictBody(Body):
    inputs: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]})]
    parameters: Parameters = Field(default_factory=Parameters)


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """What the stages need from a valid request."""

    inputs: Inputs
    param: str
    truncate: bool
    options: OutputOptions
    model: str

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(value for value in self.inputs if isinstance(value, str))


def parse_embeddings(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(EmbeddingsBody, body)
    if parsed.model is not None and parsed.model != card.name:
        raise ModelNotFound(
            f"the model {shown(parsed.model)} does not exist; served here: {card.name!r}", param="model"
        )
    if card.task != "embeddings":
        raise InvalidField(f"model {card.name!r} serves {card.task}, not embeddings; call POST /predict", param="model")
    if parsed.dimensions is not None and card.hidden_size is not None and parsed.dimensions > card.hidden_size:
        raise InvalidField(
            f"dimensions must be at most {card.hidden_size}, the size of the embeddings; got {parsed.dimensions}",
            param="dimensions",
        )
    options = OutputOptions("/v1/embeddings", dimensions=parsed.dimensions, base64=parsed.encoding_format == "base64")
    return ParsedRequest(_inputs(parsed.input, "input", limits, tokens_allowed=True), "input", True, options, card.name)


def parse_predict(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField or TooLarge."""
    parsed = parse(PredictBody, body)
    top_k = parsed.parameters.top_k
    if card.task == "fill-mask" and top_k is not None and top_k > MAX_FILLS:
        raise InvalidField(
            f"parameters.top_k must be at most {MAX_FILLS} for fill-mask; got {top_k}",
            param="parameters.top_k",
        )
    inputs = _inputs(parsed.inputs, "inputs", limits, tokens_allowed=False)
    return ParsedRequest(
        inputs, "inputs", parsed.parameters.truncate, OutputOptions("/predict", top_k=top_k), card.name
    )


def frame_embeddings(fragments: Sequence[bytes], card: ModelCard, tokens: int) -> bytes:
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
        b",".join(fragments),
        to_json(card.name),
        usage,
    )


def frame_predict(fragments: Sequence[bytes], card: ModelCard, tokens: int) -> bytes:
    usage = b'{"input_tokens":%d}' % tokens
    return b'{"model":%b,"task":%b,"predictions":[%b],"usage":%b}' % (
        to_json(card.name),
        to_json(card.task),
        b",".join(fragments),
        usage,
    )


# --- fields ----------------------------------------------------------------------------------------------------------


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """Validate a body. Raises InvalidJson or InvalidField."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        raise InvalidJson(f"the body is not JSON: {problem['ctx']['error']}")
    field = ".".join(map(str, problem["loc"]))[:_SHOWN_CHARS]
    if problem["type"] == "missing":
        raise InvalidField(f"{field} is required", param=field)
    if problem["type"] == "extra_forbidden":
        section = Parameters if len(problem["loc"]) > 1 else kind
        known = ", ".join(section.model_fields)
        raise InvalidField(f"{field} is not a field of this request; known: {known}", param=field)
    if not field:
        raise InvalidField(f"the body must be a JSON object; got {_kind(problem['input'])}")
    got = _kind(problem["input"]) if field == "parameters" else shown(problem["input"])
    raise InvalidField(f"{field}: {problem['msg']}; got {got}", param=field)


def _inputs(value: Any, param: str, limits: LimitsConfig, *, tokens_allowed: bool) -> Inputs:
    """The inputs as a tuple, all texts or all token ids."""
    if isinstance(value, str):
        value = [value]
    rule = "a string or a list of strings" + (", or a list of token ids or of such lists" if tokens_allowed else "")
    if not isinstance(value, list):
        raise InvalidField(f"{param} must be {rule}; got {_kind(value)}", param=param)
    if not value:
        raise InvalidField(f"{param} must not be an empty list", param=param)
    if tokens_allowed and _is_integer(value[0]):
        value = [value]
    if len(value) > limits.max_inputs:
        raise TooLarge(
            f"{param} has {len(value)} inputs; at most {limits.max_inputs} are allowed in one request",
            param=param,
        )
    size = sum(len(one) for one in value if isinstance(one, str | list))
    if size > limits.max_request_chars:
        raise TooLarge(
            f"{param} has {size} characters or token ids in all; at most {limits.max_request_chars} are allowed in one "
            "request",
            param=param,
        )
    if tokens_allowed and isinstance(value[0], list):
        return tuple(_token_ids(ids, f"{param}[{i}]", param, limits) for i, ids in enumerate(value))
    return tuple(_text(text, f"{param}[{i}]", param, rule, limits) for i, text in enumerate(value))


def _text(text: Any, where: str, param: str, rule: str, limits: LimitsConfig) -> str:
    if not isinstance(text, str):
        raise InvalidField(f"{param} must be {rule}; {where} is {_kind(text)}", param=param)
    if not text:
        raise InvalidField(f"{where} must not be an empty string", param=param)
    if len(text) > limits.max_input_chars:
        raise InvalidField(
            f"{where} has {len(text)} characters; at most {limits.max_input_chars} are allowed", param=param
        )
    return text


def _token_ids(ids: Any, where: str, param: str, limits: LimitsConfig) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids:
        raise InvalidField(f"{where} must be a non-empty list of token ids; got {_kind(ids)}", param=param)
    if len(ids) > limits.max_input_chars:
        raise InvalidField(
            f"{where} has {len(ids)} token ids; at most {limits.max_input_chars} are allowed", param=param
        )
    for position, token in enumerate(ids):
        if not _is_integer(token):
            raise InvalidField(f"{where}[{position}] must be a token id; got {_kind(token)}", param=param)
        if not 0 <= token < 2**31:
            raise InvalidField(
                f"{where}[{position}] must be a token id of the vocabulary; got {shown(token)}", param=param
            )
    return tuple(ids)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """The type of a JSON value in words, so that input content stays out of messages."""
    kinds = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "an empty list" if value == [] else kinds.get(type(value), "null")


def shown(value: Any) -> str:
    """A short value of a field that is not input text."""
    return repr(value)[:_SHOWN_CHARS] if isinstance(value, (str, int, float, bool)) else _kind(value)

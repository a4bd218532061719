"""What the bodies of all APIs have in common: validation, field by field, in terms of the configured limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import InvalidField, InvalidJson, ModelNotFound, TooLarge
from deployments.messages import OutputOptions, Postprocessed, Task, Tokenized

Parsed = TypeVar("Parsed", bound="Body")
_SHOWN_CHARS = 80
"""Maximum characters of a client's value shown in a message, because messages also go into telemetry."""
Inputs = tuple[str, ...] | tuple[tuple[int, ...], ...]
STRINGS_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1}
TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        STRINGS_SCHEMA,
        TOKENS_SCHEMA,
        {"type": "array", "items": TOKENS_SCHEMA, "minItems": 1},
    ]
}


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as it has arrived."""

    body: bytes
    headers: Mapping[str, str]
    path_params: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """What the stages need from a valid request."""

    inputs: Inputs
    param: str
    truncate: bool
    options: OutputOptions
    model: str
    query: str | None = None
    """What the inputs, texts then, are compared with by a cross-encoder."""
    timeout_ms: float | None = None
    priority: str | None = None
    """As in X-Priority. Both are fields of the body in some APIs."""
    describes: bool = False
    """Whether the tokens are all that is wanted."""
    adds_special_tokens: bool = True
    types: tuple[tuple[int, ...], ...] = ()
    """Token types of token ids, see ``messages.TokenizeRequest``."""
    response_id: str = ""
    """Of the response, if its API has one that the client sets."""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(value for value in self.inputs if isinstance(value, str))

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts)) + len(self.query or "")


@dataclass(frozen=True, slots=True)
class Answered:
    """A request and what the stages have made of it."""

    request: ParsedRequest
    card: ModelCard
    tokenized: Tokenized
    postprocessed: Postprocessed
    """Empty for a request that ends with its tokens."""

    @property
    def tokens(self) -> int:
        return sum(self.tokenized.ids.lengths)

    @property
    def joined(self) -> bytes:
        """The postprocessor's fragments as elements of a list."""
        return b",".join(self.postprocessed.fragments)


@dataclass(frozen=True, slots=True)
class Framed:
    """The body of a response."""

    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def check_model(model: str | None, card: ModelCard) -> None:
    """Raises ModelNotFound."""
    if model in card.beside:
        raise InvalidField(f"the model {shown(model)} does not serve this route; {card.name!r} does", param="model")
    if model is not None and model != card.name:
        raise ModelNotFound(f"the model {shown(model)} does not exist; served here: {served(card)}", param="model")


def served(card: ModelCard) -> str:
    """The names of the models."""
    return ", ".join(map(repr, (card.name, *card.beside)))


def check_task(card: ModelCard, route: str, *tasks: Task) -> None:
    """Raises InvalidField if the model cannot do what the route is for."""
    if card.task not in tasks:
        raise InvalidField(
            f"model {card.name!r} serves {card.task}, not {' or '.join(tasks)}; call {_ROUTE_OF[card.task]} instead of "
            f"{route}",
            param="model",
        )


_ROUTE_OF: dict[Task, str] = {
    "embeddings": "POST /v1/embeddings",
    "text-classification": "POST /predict",
    "token-classification": "POST /predict",
    "fill-mask": "POST /predict",
    "text-ranking": "POST /rerank",
    "text-generation": "POST /v1/chat/completions",
}


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
        known = ", ".join(_section(kind, problem["loc"][:-1]).model_fields)
        raise InvalidField(f"{field} is not a field of this request; known: {known}", param=field)
    if not field:
        raise InvalidField(f"the body must be a JSON object; got {_kind(problem['input'])}")
    # What is there instead of an object or a list may be a text, which stays out of messages.
    is_structure = problem["type"] in ("model_type", "list_type", "dict_type")
    got = _kind(problem["input"]) if is_structure else shown(problem["input"])
    raise InvalidField(f"{field}: {problem['msg']}; got {got}", param=field)


def _section(kind: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The body's part that a path of field names leads to."""
    for part in path:
        # The number of an element says nothing of its type.
        if isinstance(part, str) and part in kind.model_fields:
            kind = _model_in(kind.model_fields[part].annotation) or kind
    return kind


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field consists of, alone, in a list or as one of several types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model_in(one)) is not None), None)


def checked_inputs(value: Any, param: str, limits: LimitsConfig, *, tokens_allowed: bool) -> Inputs:
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
    return tuple(checked_text(text, f"{param}[{i}]", param, rule, limits) for i, text in enumerate(value))


def checked_text(text: Any, where: str, param: str, rule: str, limits: LimitsConfig) -> str:
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

"""OpenAI's embeddings, and this project's own ``/predict``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema
from pydantic_core import to_json

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.engine.protocol import MAX_FILLS
from deployments.errors import InvalidField
from deployments.messages import OutputOptions
from deployments.protocols.fields import (
    INPUT_SCHEMA,
    STRINGS_SCHEMA,
    Answered,
    Body,
    Framed,
    ParsedRequest,
    check_model,
    check_task,
    checked_inputs,
    parse,
)


class EmbeddingsBody(Body):
    """OpenAI's embeddings request. ``user`` is accepted but not used."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = Field(
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
    inputs: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS_SCHEMA]})]
    parameters: Parameters = Field(default_factory=Parameters)
    model: str | None = Field(None, description="The served model; optional.")


def parse_embeddings(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(EmbeddingsBody, body)
    check_model(parsed.model, card)
    check_task(card, "/v1/embeddings", "embeddings")
    check_dimensions(parsed.dimensions, card)
    options = OutputOptions("/v1/embeddings", dimensions=parsed.dimensions, base64=parsed.encoding_format == "base64")
    inputs = checked_inputs(parsed.input, "input", limits, tokens_allowed=True)
    return ParsedRequest(inputs, "input", True, options, card.name)


def check_dimensions(dimensions: int | None, card: ModelCard) -> None:
    """Raises InvalidField."""
    if dimensions is not None and card.hidden_size is not None and dimensions > card.hidden_size:
        raise InvalidField(
            f"dimensions must be at most {card.hidden_size}, the size of the embeddings; got {dimensions}",
            param="dimensions",
        )


def parse_predict(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(PredictBody, body)
    check_model(parsed.model, card)
    check_task(card, "/predict", "embeddings", "text-classification", "token-classification", "fill-mask")
    check_top_k(parsed.parameters.top_k, card, "parameters.top_k")
    inputs = checked_inputs(parsed.inputs, "inputs", limits, tokens_allowed=False)
    options = OutputOptions("/predict", top_k=parsed.parameters.top_k)
    return ParsedRequest(inputs, "inputs", parsed.parameters.truncate, options, card.name)


def check_top_k(top_k: int | None, card: ModelCard, param: str) -> None:
    """Raises InvalidField."""
    if card.task == "fill-mask" and top_k is not None and top_k > MAX_FILLS:
        raise InvalidField(f"{param} must be at most {MAX_FILLS} for fill-mask; got {top_k}", param=param)


def frame_embeddings(answered: Answered) -> Framed:
    name, usage = to_json(answered.card.name), b'{"prompt_tokens":%d,"total_tokens":%d}' % ((answered.tokens,) * 2)
    return Framed(b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (answered.joined, name, usage))


def frame_predict(answered: Answered) -> Framed:
    return Framed(
        b'{"model":%b,"task":%b,"predictions":[%b],"usage":%b}'
        % (
            to_json(answered.card.name),
            to_json(answered.card.task),
            answered.joined,
            b'{"input_tokens":%d}' % answered.tokens,
        )
    )

"""The inference routes: how each parses its body and frames its response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.http.generation import (
    Answer,
    ChatAnswer,
    ChatBody,
    CompletionAnswer,
    CompletionBody,
    ParsedGeneration,
    parse_chat,
    parse_completion,
)
from deployments.http.schemas import (
    EmbeddingsBody,
    ParsedRequest,
    PredictBody,
    frame_embeddings,
    frame_predict,
    parse_embeddings,
    parse_predict,
)


@dataclass(frozen=True, slots=True)
class Route:
    """One inference route."""

    path: str
    operation: str
    """``gen_ai.operation.name`` of its requests."""
    body: type[BaseModel]
    parse: Callable[[bytes, ModelCard, LimitsConfig], ParsedRequest]
    frame: Callable[[Sequence[bytes], ModelCard, int], bytes]


@dataclass(frozen=True, slots=True)
class GenerationRoute:
    """One route of language models."""

    path: str
    operation: str
    """``gen_ai.operation.name`` of its requests."""
    body: type[BaseModel]
    parse: Callable[[bytes, ModelCard, LimitsConfig], ParsedGeneration]
    answer: type[Answer]


GENERATION_ROUTES = (
    GenerationRoute("/v1/chat/completions", "chat", ChatBody, parse_chat, ChatAnswer),
    GenerationRoute("/v1/completions", "text_completion", CompletionBody, parse_completion, CompletionAnswer),
)
ROUTES = (
    Route("/v1/embeddings", "embeddings", EmbeddingsBody, parse_embeddings, frame_embeddings),
    Route("/predict", "predict", PredictBody, parse_predict, frame_predict),
)


def body_schema(route: Route | GenerationRoute) -> dict[str, Any]:
    """The request body for the OpenAPI document, its definitions in place."""
    schema = route.body.model_json_schema()
    in_place = _in_place(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": in_place}}}}


def _in_place(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_in_place(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _in_place(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {key: _in_place(value, definitions) for key, value in part.items()}

"""The inference routes: how each parses its body and frames its response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
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


ROUTES = (
    Route("/v1/embeddings", "embeddings", EmbeddingsBody, parse_embeddings, frame_embeddings),
    Route("/predict", "predict", PredictBody, parse_predict, frame_predict),
)


def body_schema(route: Route) -> dict[str, Any]:
    """The request body for the OpenAPI document, its definitions in place."""
    schema = route.body.model_json_schema()
    definitions = schema.pop("$defs", {})
    for name, field in schema["properties"].items():
        if field.get("$ref"):
            schema["properties"][name] = definitions[field["$ref"].rpartition("/")[2]]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

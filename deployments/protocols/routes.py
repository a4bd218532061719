"""The inference routes: how each parses its body and frames its response."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.messages import Task
from deployments.protocols import embeddings_inference, openai, rerank
from deployments.protocols.errors import (
    ErrorForm,
    cohere_error,
    embeddings_inference_error,
    open_inference_error,
    openai_error,
)
from deployments.protocols.fields import Incoming, ParsedRequest
from deployments.protocols.generation import (
    Answer,
    ChatAnswer,
    ChatBody,
    CompletionAnswer,
    CompletionBody,
    ParsedGeneration,
    parse_chat,
    parse_completion,
)
from deployments.protocols.open_inference import generation as generation_infer
from deployments.protocols.open_inference import rest, rpc

PREDICT_TASKS: tuple[Task, ...] = ("embeddings", "text-classification", "token-classification", "fill-mask")
ENCODER_TASKS: tuple[Task, ...] = (*PREDICT_TASKS, "text-ranking")
Parse = Callable[[bytes, ModelCard, LimitsConfig], ParsedRequest]


@dataclass(frozen=True, slots=True)
class Route:
    """One inference route.

    ``parse`` takes an ``Incoming``, or, of a gRPC method, the message, and returns a ``ParsedRequest``. ``frame`` makes
    the response of an ``Answered``. For language models they are a ``ParsedGeneration``, and it with the card and the
    choices.
    """

    path: str
    """Also the route in telemetry: of a gRPC method, its name."""
    operation: str
    """``gen_ai.operation.name`` of its requests."""
    tasks: tuple[Task, ...]
    """Of the models that it is for; others refuse it by name."""
    body: type[BaseModel]
    parse: Callable[[Any, ModelCard, LimitsConfig], Any]
    frame: Callable[..., Any]
    error: ErrorForm = openai_error

    @property
    def runs_model(self) -> bool:
        """Or whether tokens are all that is wanted."""
        return self.operation != "tokenize"


def _of_body(parse: Parse) -> Callable[[Incoming, ModelCard, LimitsConfig], ParsedRequest]:
    """Of a request, its body says everything."""
    return lambda incoming, card, limits: parse(incoming.body, card, limits)


@dataclass(frozen=True, slots=True)
class GenerationRoute:
    """One route of language models."""

    path: str
    operation: str
    """``gen_ai.operation.name`` of its requests."""
    body: type[BaseModel]
    parse: Callable[[bytes, ModelCard, LimitsConfig], ParsedGeneration]
    answer: type[Answer]
    runs_model: ClassVar[bool] = True


GENERATION_ROUTES = (
    GenerationRoute("/v1/chat/completions", "chat", ChatBody, parse_chat, ChatAnswer),
    GenerationRoute("/v1/completions", "text_completion", CompletionBody, parse_completion, CompletionAnswer),
)
ROUTES = (
    Route(
        "/v1/embeddings",
        "embeddings",
        ("embeddings",),
        openai.EmbeddingsBody,
        _of_body(openai.parse_embeddings),
        openai.frame_embeddings,
    ),
    Route(
        "/predict", "predict", PREDICT_TASKS, openai.PredictBody, _of_body(openai.parse_predict), openai.frame_predict
    ),
    Route(
        "/embed",
        "embeddings",
        ("embeddings",),
        embeddings_inference.EmbedBody,
        _of_body(embeddings_inference.parse_embed),
        embeddings_inference.frame_list,
        embeddings_inference_error,
    ),
    Route(
        "/similarity",
        "embeddings",
        ("embeddings",),
        embeddings_inference.SimilarityBody,
        _of_body(embeddings_inference.parse_similarity),
        embeddings_inference.frame_list,
        embeddings_inference_error,
    ),
    Route(
        "/rerank",
        "rerank",
        ("text-ranking",),
        embeddings_inference.RerankBody,
        _of_body(embeddings_inference.parse_rerank),
        embeddings_inference.frame_list,
        embeddings_inference_error,
    ),
    Route(
        "/tokenize",
        "tokenize",
        ENCODER_TASKS,
        embeddings_inference.TokenizeBody,
        _of_body(embeddings_inference.parse_tokenize),
        embeddings_inference.frame_tokens,
        embeddings_inference_error,
    ),
    *(
        Route(
            path,
            "rerank",
            ("text-ranking",),
            rerank.RerankBody,
            _of_body(rerank.parse_rerank),
            rerank.frame_rerank,
            cohere_error,
        )
        for path in ("/v1/rerank", "/v2/rerank")
    ),
)
OPEN_INFERENCE = Route(
    "/v2/models/{model}/infer",
    "infer",
    ENCODER_TASKS,
    rest.InferBody,
    rest.parse_rest,
    rest.frame_rest,
    open_inference_error,
)
"""With or without ``/versions/{version}``."""
GENERATION_INFER = Route(
    "/v2/models/{model}/infer",
    "text_completion",
    ("text-generation",),
    rest.InferBody,
    generation_infer.parse_rest,
    generation_infer.frame_rest,
    open_inference_error,
)
"""The same for language models."""
GENERATION_MODEL_INFER = Route(
    rpc.INFER,
    "text_completion",
    ("text-generation",),
    rest.InferBody,
    generation_infer.parse_rpc,
    generation_infer.frame_rpc,
)
MODEL_INFER = Route(rpc.INFER, "infer", ENCODER_TASKS, rest.InferBody, rpc.parse_rpc, rpc.frame_rpc)
"""Over gRPC."""


def body_schema(route: Route | GenerationRoute) -> dict[str, Any]:
    """The request for the OpenAPI document: the body, its definitions in place, and parameters of the path."""
    schema = route.body.model_json_schema()
    in_place = _in_place(schema, schema.pop("$defs", {}))
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": in_place}}},
        **({"parameters": parameters} if parameters else {}),
    }


def _in_place(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_in_place(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _in_place(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {key: _in_place(value, definitions) for key, value in part.items()}

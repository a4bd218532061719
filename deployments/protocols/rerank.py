"""Cohere's ``/v1/rerank`` and ``/v2/rerank``, which Jina's clients call too."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema
from pydantic_core import to_json

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.errors import InvalidField
from deployments.messages import OutputOptions
from deployments.protocols.fields import (
    Answered,
    Body,
    Framed,
    ParsedRequest,
    check_model,
    check_task,
    checked_inputs,
    checked_text,
    parse,
)

_DOCUMENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    ]
}


class RerankBody(Body):
    """A document is one chunk here, and what is too long of it is cut off."""

    query: str
    documents: Annotated[Any, WithJsonSchema({"type": "array", "items": _DOCUMENT_SCHEMA, "minItems": 1})]
    model: str | None = Field(None, description="The served model; optional.")
    top_n: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="How many results; default: all.")
    return_documents: bool | None = Field(False, description="Whether results contain their documents.")
    max_chunks_per_doc: Annotated[int, Field(ge=1)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Not below the model's maximum length."
    )
    rank_fields: None = Field(None, description="Only null: documents are ranked by `text`.")
    priority: None = None


def parse_rerank(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(RerankBody, body)
    check_model(parsed.model, card)
    check_task(card, "/v1/rerank", "text-ranking")
    if parsed.max_tokens_per_doc is not None and parsed.max_tokens_per_doc < card.max_length:
        raise InvalidField(
            f"max_tokens_per_doc must be at least {card.max_length}, which the model takes; got "
            f"{parsed.max_tokens_per_doc}",
            param="max_tokens_per_doc",
        )
    documents = parsed.documents
    if isinstance(documents, list):
        documents = [one.get("text") if isinstance(one, dict) else one for one in documents]
    return ParsedRequest(
        inputs=checked_inputs(documents, "documents", limits, tokens_allowed=False),
        param="documents",
        truncate=True,
        options=OutputOptions("/v1/rerank", top_k=parsed.top_n, wants_texts=bool(parsed.return_documents)),
        model=card.name,
        query=checked_text(parsed.query, "query", "query", "a string", limits),
        response_id=str(uuid.uuid4()),
    )


def frame_rerank(answered: Answered) -> Framed:
    meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    usage = {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens}
    return Framed(
        b'{"id":%b,"object":"list","model":%b,"results":[%b],"meta":%b,"usage":%b}'
        % (
            to_json(answered.request.response_id),
            to_json(answered.card.name),
            answered.joined,
            to_json(meta),
            to_json(usage),
        )
    )

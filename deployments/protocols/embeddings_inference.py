"""The routes of text-embeddings-inference: ``/embed``, ``/similarity``, ``/rerank``, ``/tokenize`` and ``/info``.

Values that change nothing are accepted for fields that are not supported; others are refused by name. As in its newer
versions, inputs that are too long are truncated unless ``truncate`` is false.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema
from pydantic_core import to_json

from deployments import __version__
from deployments.config import AppConfig, LimitsConfig
from deployments.engine.card import ModelCard
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
    checked_text,
    parse,
)
from deployments.protocols.openai import check_dimensions

_DIRECTION = Field(None, description="Only `right`: the end of a text is cut off.")
_PROMPT = Field(None, description="Only null: texts get the model's default prompt.")
_TRUNCATE = Field(None, description="Truncate inputs that are too long (default); if false, reject them.")
_MODEL = Field(None, description="The served model; optional.")
Direction = Literal["right", "Right"]


class EmbedBody(Body):
    inputs: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    normalize: bool = Field(True, description="Whether embeddings have norm 1.")
    truncate: bool | None = _TRUNCATE
    truncation_direction: Direction | None = _DIRECTION
    prompt_name: None = _PROMPT
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="Keep only this many leading dimensions.")
    model: str | None = _MODEL


class SimilarityInputs(Body):
    source_sentence: str
    sentences: list[str]


class SimilarityParameters(Body):
    truncate: bool | None = _TRUNCATE
    truncation_direction: Direction | None = _DIRECTION
    prompt_name: None = _PROMPT


class SimilarityBody(Body):
    inputs: SimilarityInputs
    parameters: SimilarityParameters = Field(default_factory=SimilarityParameters)
    model: str | None = _MODEL


class RerankBody(Body):
    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="Logits instead of scores between 0 and 1.")
    return_text: bool = Field(False, description="Whether results contain their texts.")
    truncate: bool | None = _TRUNCATE
    truncation_direction: Direction | None = _DIRECTION
    model: str | None = _MODEL


class TokenizeBody(Body):
    inputs: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS_SCHEMA]})]
    add_special_tokens: bool = True
    prompt_name: None = _PROMPT
    model: str | None = _MODEL


def parse_embed(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(EmbedBody, body)
    check_model(parsed.model, card)
    check_task(card, "/embed", "embeddings")
    check_dimensions(parsed.dimensions, card)
    inputs = checked_inputs(parsed.inputs, "inputs", limits, tokens_allowed=True)
    options = OutputOptions("/embed", dimensions=parsed.dimensions, normalize=parsed.normalize)
    return ParsedRequest(inputs, "inputs", parsed.truncate is not False, options, card.name)


def parse_similarity(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(SimilarityBody, body)
    check_model(parsed.model, card)
    check_task(card, "/similarity", "embeddings")
    sentences = checked_inputs(parsed.inputs.sentences, "inputs.sentences", limits, tokens_allowed=False)
    param = "inputs.source_sentence"
    source = checked_text(parsed.inputs.source_sentence, param, param, "a string", limits)
    truncate = parsed.parameters.truncate is not False
    return ParsedRequest((source, *sentences), "inputs", truncate, OutputOptions("/similarity"), card.name)


def parse_rerank(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(RerankBody, body)
    check_model(parsed.model, card)
    check_task(card, "/rerank", "text-ranking")
    return ParsedRequest(
        inputs=checked_inputs(parsed.texts, "texts", limits, tokens_allowed=False),
        param="texts",
        truncate=parsed.truncate is not False,
        options=OutputOptions("/rerank", raw_scores=parsed.raw_scores, wants_texts=parsed.return_text),
        model=card.name,
        query=checked_text(parsed.query, "query", "query", "a string", limits),
    )


def parse_tokenize(body: bytes, card: ModelCard, limits: LimitsConfig) -> ParsedRequest:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    parsed = parse(TokenizeBody, body)
    check_model(parsed.model, card)
    return ParsedRequest(
        inputs=checked_inputs(parsed.inputs, "inputs", limits, tokens_allowed=False),
        param="inputs",
        truncate=False,
        options=OutputOptions("/embed"),
        model=card.name,
        describes=True,
        adds_special_tokens=parsed.add_special_tokens,
    )


def frame_list(answered: Answered) -> Framed:
    """A list without more, as ``/embed``, ``/similarity`` and ``/rerank`` return."""
    return Framed(b"[%b]" % answered.joined)


def frame_tokens(answered: Answered) -> Framed:
    """The tokens of each input; the text of one is what it stands for in the input, or its name if it is special."""
    tokenized = answered.tokenized
    assert tokenized.offsets is not None
    listed = []
    for text, ids, offsets, tokens in zip(
        answered.request.texts, tokenized.ids, tokenized.offsets, tokenized.tokens, strict=True
    ):
        listed.append(
            [
                {"id": i, "text": name, "special": True, "start": None, "stop": None}
                if start < 0
                else {"id": i, "text": text[start:stop], "special": False, "start": start, "stop": stop}
                for i, (start, stop), name in zip(ids.tolist(), offsets.tolist(), tokens, strict=True)
            ]
        )
    return Framed(to_json(listed))


def info(config: AppConfig, card: ModelCard) -> dict[str, Any]:
    """The body of ``GET /info``. ``model_dtype`` is what is configured: the model replica resolves ``auto``."""
    labels = dict(enumerate(card.labels))
    by_name = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    kinds: dict[str, dict[str, Any]] = {
        "embeddings": {"embedding": {"pooling": card.pooling}},
        "text-classification": {"classifier": by_name},
        "text-ranking": {"reranker": by_name},
    }
    return {
        "model_id": config.model.source if config.model.engine != "fake" else "fake",
        "model_sha": config.model.revision,
        "model_dtype": config.model.dtype,
        "served_model_name": card.name,
        "model_type": kinds.get(card.task, {card.task: {}}),
        "max_concurrent_requests": config.batching.max_queue,
        "max_input_length": card.max_length,
        "max_batch_tokens": config.batching.max_batch_tokens,
        "max_batch_requests": config.batching.max_batch_size,
        "max_client_batch_size": config.limits.max_inputs,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }

"""Converts model output to what each route returns, for each task. The rules are those of transformers' pipelines."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import to_json

from deployments.engine.card import ModelCard
from deployments.engine.outputs.scores import best_first, class_scores, ranking_scores, softmax
from deployments.engine.outputs.tensors import build_tensors
from deployments.errors import ModelFailed
from deployments.messages import Ids, OutputOptions, Postprocessed, Tokenized

Floats = npt.NDArray[np.float32]
DEFAULT_FILLS = 5


class PredictionBuilder:
    """Builds the predictions of one model.

    Args:
        card: metadata of the model.
        pretrained: its transformers tokenizer, for tasks whose predictions contain words.
    """

    def __init__(self, card: ModelCard, pretrained: Any = None) -> None:
        self._card, self._pretrained = card, pretrained

    def build(
        self, tokenized: Tokenized, outputs: Sequence[Any], options: OutputOptions, texts: Sequence[str]
    ) -> Postprocessed:
        """Build what the route asks for. Raises ModelFailed if an output is not finite."""
        for index, output in enumerate(outputs):
            values = output if isinstance(output, np.ndarray) else output[0]
            if not np.isfinite(values).all():
                raise ModelFailed(f"the model returned a non-finite number for input {index}")
        if self._card.task == "embeddings":
            outputs = [_finished(output, options) for output in outputs]
        match options.route:
            case "/v1/embeddings":
                return Postprocessed(tuple(_openai_embedding(i, output, options) for i, output in enumerate(outputs)))
            case "/embed":
                return Postprocessed(tuple(to_json(output.tolist()) for output in outputs))
            case "/similarity":
                source, *others = outputs
                return Postprocessed(tuple(to_json(float(source @ one)) for one in others))
            case "/rerank" | "/v1/rerank":
                return Postprocessed(tuple(map(to_json, _ranking(outputs, options, texts))))
            case "/v2":
                made = partial(self._predictions, tokenized, outputs, options, texts)
                return Postprocessed((), build_tensors(self._card, tokenized, outputs, options, made))
            case "/predict":
                return Postprocessed(tuple(map(to_json, self._predictions(tokenized, outputs, options, texts))))

    def _predictions(
        self, tokenized: Tokenized, outputs: Sequence[Any], options: OutputOptions, texts: Sequence[str]
    ) -> list[dict[str, Any]]:
        ids, offsets = list(tokenized.ids), list(tokenized.offsets or [])
        return [
            self._prediction(out, options, ids[i], offsets[i] if offsets else None, texts[i] if texts else "")
            | {"truncated": tokenized.truncated[i]}
            for i, out in enumerate(outputs)
        ]

    def _prediction(
        self, output: Any, options: OutputOptions, ids: Ids, offsets: npt.NDArray[np.int32] | None, text: str
    ) -> dict[str, Any]:
        match self._card.task:
            case "embeddings":
                return {"embedding": output.tolist()}
            case "text-classification":
                return classify(output, self._card, options.top_k)
            case "token-classification":
                assert offsets is not None
                return {"entities": self._entities(output, ids, offsets, text)}
            case "fill-mask":
                return {"fills": self._fills(output, ids, options.top_k or DEFAULT_FILLS)}
            case task:
                raise AssertionError(f"{task} has no predictions")

    def _entities(self, logits: Floats, ids: Ids, offsets: npt.NDArray[np.int32], text: str) -> list[dict[str, Any]]:
        """One entity per token that is not special and not labelled ``O`` (aggregation strategy ``none``)."""
        scores = softmax(logits)
        best = scores.argmax(axis=-1)
        entities = []
        for position, (start, end) in enumerate(offsets.tolist()):
            label = self._card.labels[best[position]]
            if start == -1 or label == "O":
                continue
            token, is_placed = int(ids[position]), start >= 0
            has_text = is_placed and token == self._pretrained.unk_token_id
            entities.append(
                {
                    "entity": label,
                    "score": float(scores[position, best[position]]),
                    "word": text[start:end] if has_text else self._pretrained.convert_ids_to_tokens(token),
                    "start": start if is_placed else None,
                    "end": end if is_placed else None,
                }
            )
        return entities

    def _fills(self, output: tuple[Floats, Ids], ids: Ids, top_k: int) -> list[dict[str, Any]]:
        """The ``top_k`` best tokens for each mask in turn. With several masks, each fill has its ``mask`` number."""
        probabilities, candidates = output
        positions = np.flatnonzero(ids == self._pretrained.mask_token_id)
        fills = []
        for number, position in enumerate(positions):
            for score, token in zip(probabilities[number, :top_k], candidates[number, :top_k], strict=True):
                filled = ids.copy()
                filled[position] = token
                # With several masks, the others must stay visible in the sequence.
                sequence = self._pretrained.decode(filled.tolist(), skip_special_tokens=len(positions) == 1)
                fill = {
                    "token": self._pretrained.decode([int(token)]),
                    "score": float(score),
                    "sequence": sequence,
                }
                fills.append(fill if len(positions) == 1 else {**fill, "mask": number})
        return fills


def classify(logits: Floats, card: ModelCard, top_k: int | None) -> dict[str, Any]:
    """Return the best label, and the ``top_k`` best (default: all) with their scores."""
    scores = class_scores(logits, card)
    order = best_first(scores, top_k)
    ranked = [{"label": card.labels[i], "score": float(scores[i])} for i in order]
    return {**ranked[0], "scores": ranked}


def _finished(embedding: Floats, options: OutputOptions) -> Floats:
    """Cut to the dimensions that are wanted and, unless that is not wanted, of norm 1."""
    embedding = embedding[: options.dimensions]
    if not options.normalize:
        return embedding
    finished: Floats = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
    return finished


def _openai_embedding(index: int, embedding: Floats, options: OutputOptions) -> bytes:
    value = base64.b64encode(embedding.astype("<f4").tobytes()).decode() if options.base64 else embedding.tolist()
    return to_json({"object": "embedding", "index": index, "embedding": value})


def _ranking(outputs: Sequence[Floats], options: OutputOptions, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The texts by relevance, best first, equal ones in the order of the request."""
    scores = ranking_scores(outputs, raw=options.raw_scores)
    order = best_first(scores, options.top_k).tolist()
    if options.route == "/rerank":
        return [
            {"index": i, "score": float(scores[i])} | ({"text": texts[i]} if options.wants_texts else {}) for i in order
        ]
    return [
        {"index": i, "relevance_score": float(scores[i])}
        | ({"document": {"text": texts[i]}} if options.wants_texts else {})
        for i in order
    ]

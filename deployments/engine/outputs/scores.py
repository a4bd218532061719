"""Logits to scores. The rules are those of transformers' pipelines and of sentence-transformers' CrossEncoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deployments.engine.card import ModelCard

Floats = npt.NDArray[np.float32]


def class_scores(logits: Floats, card: ModelCard) -> Floats:
    """The score of each label, of shape ``[labels]``."""
    match card.score_function:
        case "softmax":
            return softmax(logits)
        case "sigmoid":
            return sigmoid(logits)
        case "none":
            return logits


def ranking_scores(outputs: Sequence[Floats], *, raw: bool) -> Floats:
    """How relevant each text is, of shape ``[texts]``: the logit if ``raw``, else its sigmoid."""
    logits = np.array([output[0] for output in outputs], dtype=np.float32)
    return logits if raw else sigmoid(logits)


def best_first(scores: Floats, top_k: int | None) -> npt.NDArray[np.intp]:
    """The indices of the ``top_k`` highest (default: of all), equal ones in their order."""
    return np.argsort(-scores, kind="stable")[:top_k]


def softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def sigmoid(logits: Floats) -> Floats:
    # In float64, whose exp does not overflow for any logit of a model.
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)

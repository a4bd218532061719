"""The model's output as tensors of the Open Inference Protocol: which there are for each task, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import to_json

from deployments.engine.card import ModelCard
from deployments.engine.outputs.scores import best_first, class_scores, ranking_scores
from deployments.messages import OutputOptions, OutputTensor, Tokenized

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor, as the model's metadata shows it; -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


TRUNCATED = TensorSpec("truncated", "BOOL", (-1,))
"""Whether tokens of an input were cut off."""


def output_specs(card: ModelCard) -> tuple[TensorSpec, ...]:
    """The output tensors of a model; the first dimension is that of the inputs."""
    match card.task:
        case "embeddings":
            return TensorSpec("embedding", "FP32", (-1, card.hidden_size or -1)), TRUNCATED
        case "text-classification":
            # Best first, as many as top_k.
            return TensorSpec("label", "BYTES", (-1, -1)), TensorSpec("score", "FP32", (-1, -1)), TRUNCATED
        case "text-ranking":
            return TensorSpec("score", "FP32", (-1,)), TRUNCATED
        case "token-classification" | "fill-mask":
            # Their results differ in number from input to input: one JSON object each, as /predict has them.
            return TensorSpec("prediction", "BYTES", (-1,)), TRUNCATED
        case "text-generation":
            return (TensorSpec("text", "BYTES", (-1,)), TensorSpec("finish_reason", "BYTES", (-1,)))


def build_tensors(
    card: ModelCard,
    tokenized: Tokenized,
    outputs: Sequence[Any],
    options: OutputOptions,
    predictions: Callable[[], Sequence[Any]],
) -> tuple[OutputTensor, ...]:
    """Build the tensors that ``options`` names.

    Args:
        outputs: one per input, see ``engine.protocol.Output``; embeddings are cut and normalised already.
        predictions: makes the predictions of ``/predict``, for tasks whose tensors contain them.
    """
    built: dict[str, tuple[str, Any]] = {"truncated": ("BOOL", np.array(tokenized.truncated, dtype=np.bool_))}
    match card.task:
        case "embeddings":
            built["embedding"] = "FP32", np.stack(outputs)
        case "text-classification":
            scores = [class_scores(output, card) for output in outputs]
            best = [best_first(one, options.top_k) for one in scores]
            built["score"] = "FP32", np.stack([one[order] for one, order in zip(scores, best, strict=True)])
            built["label"] = "BYTES", np.array([[card.labels[i] for i in order] for order in best], dtype=object)
        case "text-ranking":
            built["score"] = "FP32", ranking_scores(outputs, raw=options.raw_scores)
        case _:
            rows = [to_json(one).decode() for one in predictions()]
            built["prediction"] = "BYTES", np.array(rows, dtype=object)
    return tuple(tensor(one.name, *built[one.name], is_raw=one.is_raw) for one in options.tensors)


def tensor(name: str, datatype: str, values: npt.NDArray[Any], *, is_raw: bool) -> OutputTensor:
    """Encode ``values``: FP32, BOOL, or BYTES as an array of strings."""
    return OutputTensor(name, datatype, values.shape, _raw(datatype, values) if is_raw else _json(values))


def _raw(datatype: str, values: npt.NDArray[Any]) -> bytes:
    """Row by row and little-endian; of BYTES, each element after its length in four bytes."""
    if datatype == "BYTES":
        encoded = [text.encode() for text in values.reshape(-1)]
        return b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
    return values.astype("<f4" if datatype == "FP32" else np.bool_).tobytes()


def _json(values: npt.NDArray[Any]) -> bytes:
    return to_json(values.reshape(-1).tolist())[1:-1]

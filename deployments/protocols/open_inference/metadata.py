"""What the protocol tells of the server and of its model."""

from __future__ import annotations

from typing import Any

from deployments import __version__
from deployments.engine.card import ModelCard
from deployments.engine.outputs.tensors import TensorSpec, output_specs
from deployments.protocols.open_inference.tensors import VERSION, input_specs

SERVER = {"name": "slowlens", "version": __version__, "extensions": ["binary_tensor_data"]}
PLATFORM = "pytorch_transformers"


def model_metadata(card: ModelCard) -> dict[str, Any]:
    return {
        "name": card.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_tensor(spec) for spec in input_specs(card)],
        "outputs": [_tensor(spec) for spec in output_specs(card)],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}

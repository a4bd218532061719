"""BentoML, with its adaptive batching: `bentoml serve bentoml_service:Embeddings --port PORT`."""

import bentoml
import numpy as np
from embedder import MAX_BATCH_SIZE, Embedder


@bentoml.service(workers=1, traffic={"timeout": 120, "concurrency": 512}, metrics={"enabled": False})
class Embeddings:
    def __init__(self) -> None:
        self.embedder = Embedder()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=60_000, route="/v1/embeddings")
    def embed(self, input: list[str]) -> np.ndarray:
        return self.embedder.encode(input)

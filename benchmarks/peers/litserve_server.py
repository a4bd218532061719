"""LitServe, with batching set up as in its documentation: `python litserve_server.py PORT`."""

import os
import sys

import litserve as ls
import numpy as np
from embedder import MAX_BATCH_SIZE, Embedder


class EmbeddingsAPI(ls.LitAPI):
    def setup(self, device):
        self.embedder = Embedder("cuda" if str(device).startswith("cuda") else "cpu")

    def decode_request(self, request):
        (text,) = request["input"]
        return text

    def batch(self, inputs):
        return list(inputs)

    def predict(self, texts):
        return self.embedder.encode(texts)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output: np.ndarray):
        return {"data": [{"index": 0, "embedding": output.tolist()}]}


if __name__ == "__main__":
    wait_s = float(os.environ.get("BENCH_WAIT_S", "0.005"))
    api = EmbeddingsAPI(max_batch_size=MAX_BATCH_SIZE, batch_timeout=wait_s, api_path="/v1/embeddings")
    server = ls.LitServer(api, accelerator="auto", timeout=120)
    server.run(port=int(sys.argv[1]), generate_client_file=False, log_level="warning")

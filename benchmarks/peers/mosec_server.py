"""mosec, set up as in its embedding example: `python mosec_server.py --port PORT`."""

import os

from embedder import MAX_BATCH_SIZE, Embedder
from mosec import Server, Worker


class Embeddings(Worker):
    def __init__(self):
        super().__init__()
        self.embedder = Embedder()

    def forward(self, data):
        vectors = self.embedder.encode([body["input"][0] for body in data])
        return [{"data": [{"index": 0, "embedding": vector.tolist()}]} for vector in vectors]


if __name__ == "__main__":
    server = Server()
    wait_ms = int(os.environ.get("BENCH_WAIT_MS", "5"))
    server.append_worker(
        Embeddings, num=1, max_batch_size=MAX_BATCH_SIZE, max_wait_time=wait_ms, timeout=120, route="/v1/embeddings"
    )
    server.run()

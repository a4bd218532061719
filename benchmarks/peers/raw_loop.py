"""The model alone, as the upper bound: no server or tokenizer, back-to-back batches. Prints requests/s by workload."""

import json
import random
import sys
import time

import torch
from embedder import MAX_BATCH_SIZE, Embedder

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0


def rate(embedder: Embedder, lengths: list[int], size: int) -> float:
    """Return inputs per second, in order of arrival, padded to the longest of each batch."""
    done, at, end = 0, 0, time.perf_counter() + SECONDS
    began = time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() < end:
            batch = [lengths[(at + i) % len(lengths)] for i in range(size)]
            at += size
            ids = torch.randint(1000, 20000, (size, max(batch)))
            mask = (torch.arange(max(batch)) < torch.tensor(batch)[:, None]).long()
            embedder.model(input_ids=ids, attention_mask=mask)
            done += size
    return done / (time.perf_counter() - began)


def mixed(count: int) -> list[int]:
    """Return token counts of texts with a log-normal number of words from 3 to 250, plus two special tokens."""
    draw = random.Random(1)
    return [int(min(250, max(3, draw.lognormvariate(3.2, 1.0)))) + 2 for _ in range(count)]


embedder = Embedder()
short = [12] * 64
print(
    json.dumps(
        {
            "short": rate(embedder, short, MAX_BATCH_SIZE),
            "mixed": max(rate(embedder, mixed(1024), size) for size in (8, 16, 32)),
        }
    )
)

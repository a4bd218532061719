"""The limit: transformers' own manager of continuous batching in one process, without HTTP.

`python raw_generate.py FOLDER DTYPE CLIENTS SECONDS PROMPTS` prints the output tokens per second of that many clients
in a closed loop. PROMPTS is a JSON file of [[token ids], output tokens] that they take in turn.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

folder, dtype, clients, seconds, prompts = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
manager = model.init_continuous_batching(
    generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
    # As much cache, and as large a step, as the servers have.
    continuous_batching_config=ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512),
)
manager.start()
asked = itertools.cycle(json.loads(Path(prompts).read_text()))


def ask() -> None:
    ids, output = next(asked)
    manager.add_request(ids, max_new_tokens=output)


for _ in range(int(clients)):
    ask()
# Untimed: until as many have ended. All clients may go in step, so that only whole rounds of answers are counted.
for _ in range(int(clients)):
    manager.get_result(timeout=600)
    ask()
tokens, answers, began = 0, 0, time.perf_counter()
while (took := time.perf_counter() - began) < float(seconds) or answers % int(clients):
    result = manager.get_result(timeout=600)
    tokens, answers = tokens + len(result.generated_tokens), answers + 1
    ask()
print(json.dumps({"tokens_per_s": tokens / took}), flush=True)
manager.stop(block=False)
os._exit(0)

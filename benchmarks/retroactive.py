"""Does retroactive sampling keep what mattered, whole? 10,000 requests, some fail, and model replicas are killed.

    python benchmarks/retroactive.py                      # about four minutes
    python benchmarks/retroactive.py --requests 2000 --kill-every 0

Clients send texts of random length to an application with two replicas of each stage; one text in 200 makes the model
raise. Afterwards the store is compared with what the clients saw: every request that took longer than 99 % of all, by
its own ``Server-Timing``, every one that failed on the server's side, and everybody who shared a run with one of these
must be there, with the spans of all stages that it went through. Exits with status 1 if a root is missing, or if spans
are missing although no replica was killed: what a killed replica held is lost with it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from harms import application, configuration, replicas
from load import URL, text_of

from deployments.engine.fake import fake_token_id
from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names

POISON, CLIENTS = "poison", 24
_LOST_WITH_IT_S = 5.0
STAGES = (names.PREPROCESS, names.BATCHED_PREDICT, names.POSTPROCESS)


@dataclass(frozen=True, slots=True)
class Answer:
    trace_id: str
    status: int
    total_ms: float
    ended_s: float
    """Monotonic."""


async def send(count: int) -> list[Answer]:
    numbers, answers = itertools.count(1), list[Answer]()
    connector = aiohttp.TCPConnector(limit=0)

    async def client(session: aiohttp.ClientSession) -> None:
        while (number := next(numbers)) <= count:
            chance = random.Random(number)
            text = text_of(min(400, int(chance.lognormvariate(2.5, 1.0)) + 1), number)
            body = {"input": [f"{POISON} {number}" if number % 200 == 0 else text]}
            async with session.post("/v1/embeddings", json=body) as answer:
                await answer.read()
            timing = dict(part.split(";dur=") for part in answer.headers.get("Server-Timing", "").split(", ") if part)
            answers.append(
                Answer(
                    answer.headers["traceresponse"].split("-")[1],
                    answer.status,
                    float(timing.get("total", 0.0)),
                    time.monotonic(),
                )
            )

    async with aiohttp.ClientSession(URL, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return answers


async def kill(every_s: float, killed: list[float]) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        if len(pids := replicas("Model")) >= 2:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(time.monotonic())


async def run(count: int, every_s: float) -> tuple[list[Answer], list[float]]:
    killed: list[float] = []
    killer = asyncio.create_task(kill(every_s, killed))
    answers = await send(count)
    killer.cancel()
    return answers, killed


def traces_of(store: Path) -> tuple[dict[str, list[Span]], list[Span]]:
    """The spans of each request, and the runs."""
    of_requests, runs = defaultdict[str, list[Span]](list), list[Span]()
    for span in TraceFiles(store).read():
        if span.name == names.BATCH_FORWARD:
            runs.append(span)
        else:
            of_requests[span.trace_id].append(span)
    return of_requests, runs


def is_whole(spans: Sequence[Span], status: int) -> bool:
    found = {span.name for span in spans}
    return names.PREDICT in found and (status != 200 or found >= set(STAGES))


def judge(
    answers: Sequence[Answer], killed: Sequence[float], of_requests: Mapping[str, Sequence[Span]], runs: Sequence[Span]
) -> bool:
    took = sorted(answer.total_ms for answer in answers if answer.status == 200)
    p99_ms = took[int(len(took) * 0.99)]
    slow = [answer for answer in answers if answer.status == 200 and answer.total_ms > p99_ms]
    failed = [answer for answer in answers if answer.status >= 500]
    by_trace = {answer.trace_id: answer for answer in answers}
    of_these = {answer.trace_id for answer in (*slow, *failed)}
    shared = {trace for run in runs if any(t in of_these for t, _ in run.links) for trace, _ in run.links} - of_these
    neighbours = [by_trace[trace] for trace in shared if trace in by_trace]
    is_right = True
    print(f"{len(answers)} requests, p99 {p99_ms:.0f} ms, {len(killed)} model replicas killed; ", end="")
    print(f"{len(of_requests)} traces kept")
    for what, ones in (("slower than 99 %", slow), ("failed", failed), ("shared a run with these", neighbours)):
        missing = [
            one for one in ones if names.PREDICT not in {span.name for span in of_requests.get(one.trace_id, ())}
        ]
        torn = [one for one in ones if one not in missing and not is_whole(of_requests[one.trace_id], one.status)]
        unexplained = [
            one for one in torn if not any(at - _LOST_WITH_IT_S <= one.ended_s <= at + _LOST_WITH_IT_S for at in killed)
        ]
        is_right &= not missing and not unexplained
        print(
            f"{what}: {len(ones)}; not kept: {len(missing)}; spans missing: {len(torn)}, "
            f"{len(unexplained)} of them while no replica was killed"
        )
    weights = [
        float(span.attributes.get(names.AI_SAMPLING_WEIGHT, 1))
        for spans in of_requests.values()
        for span in spans
        if span.name == names.PREDICT
    ]
    print(f"weights add up to {sum(weights):.0f}")
    return is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="SECONDS", help="0: never")
    options = parser.parse_args()
    model = {
        "engine": "fake",
        "fake": {"base_ms": 5.0, "per_token_us": 50.0, "poison_token": fake_token_id(POISON)},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(folder, 2, model=model, telemetry={"sampling": {"mode": "retroactive"}})
        with application(folder, config):
            answers, killed = asyncio.run(run(options.requests, options.kill_every))
            # What the last requests decided has to reach the stages, and the files.
            time.sleep(3)
        of_requests, runs = traces_of(folder / "slowlens")
    return 0 if judge(answers, killed, of_requests, runs) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A steady load of real requests, and what became of each. ``reliability.py`` runs harms under it."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

URL = "http://127.0.0.1:8000"
WORDS = ("river", "ran", "quietly", "under", "old", "stone", "bridge", "seven", "swallows", "hunted", "above", "water")
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: what is sent, and the answer that it must have, if that is known."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    started_s: float
    took_s: float
    status: int
    """0 if the connection broke."""
    code: str
    """Of our errors; else what happened instead."""
    is_wrong: bool = False


Ask = Callable[[int], Asked]


def text_of(words: int, seed: int) -> str:
    chance = random.Random(seed)
    return f"{seed} " + " ".join(chance.choice(WORDS) for _ in range(words))


def embeddings(words: int, inputs: int = 1, headers: Mapping[str, str] | None = None) -> Ask:
    """Requests for so many embeddings of texts with about as many words; all texts are different."""

    def ask(number: int) -> Asked:
        body = json.dumps({"input": [text_of(words, number * inputs + i) for i in range(inputs)]}).encode()
        return Asked("/v1/embeddings", body, headers or {})

    return ask


class Load:
    """Sends requests from a thread of its own, from ``with`` on until its end.

    Args:
        ask: makes the request with a number.
        clients: how many send the next request when they have their answer; or
        per_s: requests sent a second, whatever becomes of them.
        seed: if given, they are sent at random times, the same for the same seed and earlier with a higher rate.

    Attributes:
        answers: of every request, in order of their ends.
    """

    def __init__(self, ask: Ask, *, clients: int = 0, per_s: float = 0.0, seed: int | None = None) -> None:
        self._ask, self._clients, self._per_s = ask, clients, per_s
        self._chance = random.Random(seed) if seed is not None else None
        self.answers: list[Answered] = []
        self._number = 0
        self._ends = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._ends = True
        self._thread.join()

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(URL, timeout=timeout, connector=connector) as session:
            if self._clients:
                await asyncio.gather(*(self._client(session) for _ in range(self._clients)))
                return
            begun, at, under_way = time.monotonic(), 0.0, set()
            while not self._ends:
                await asyncio.sleep(max(0.0, begun + at / self._per_s - time.monotonic()))
                under_way.add(task := asyncio.create_task(self._one(session)))
                task.add_done_callback(under_way.discard)
                at += self._chance.expovariate(1.0) if self._chance is not None else 1.0
            await asyncio.gather(*under_way)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._ends:
            await self._one(session)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        self._number += 1
        asked = self._ask(self._number)
        headers = {"Content-Type": "application/json", **asked.headers}
        started_s = time.monotonic()
        try:
            async with session.post(asked.path, data=asked.body, headers=headers) as answer:
                content, status = await answer.read(), answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.answers.append(Answered(started_s, time.monotonic() - started_s, 0, type(error).__name__))
            return
        took_s = time.monotonic() - started_s
        self.answers.append(Answered(started_s, took_s, status, *_judged(status, content, asked)))

    # --- what became of them ---

    def since(self, started_s: float, until_s: float = float("inf")) -> list[Answered]:
        """The answers to what was sent between these monotonic times."""
        return [answer for answer in self.answers if started_s <= answer.started_s < until_s]


def _judged(status: int, content: bytes, asked: Asked) -> tuple[str, bool]:
    """The error's code and whether the answer is wrong: an error without our shape, or another embedding."""
    try:
        answer: Any = json.loads(content)
        if status == 200:
            is_wrong = asked.expected is not None and _far(answer["data"][0]["embedding"], asked.expected)
            return "", is_wrong
        return str(answer["error"]["code"]), False
    except (ValueError, KeyError, TypeError, IndexError):
        return "no answer of ours", True


def _far(one: Sequence[float], other: Sequence[float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


def percentile(answers: Sequence[Answered], share: float) -> float:
    """Seconds; 0 without answers."""
    took = sorted(answer.took_s for answer in answers)
    return took[min(len(took) - 1, int(share * len(took)))] if took else 0.0


def good(answers: Sequence[Answered]) -> list[Answered]:
    return [answer for answer in answers if answer.status == 200]


def outcomes(answers: Sequence[Answered]) -> str:
    """How many ended how."""
    counted = Counter(
        "wrong" if answer.is_wrong else f"{answer.status} {answer.code}".strip() if answer.status else answer.code
        for answer in answers
    )
    return ", ".join(f"{count:,} {what}" for what, count in counted.most_common())


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0

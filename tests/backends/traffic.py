"""Requests to all four stages in one process, on the fake engine, with telemetry to a Collector."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from google.protobuf.json_format import MessageToDict

from deployments.engine.fake import fake_token_id
from tests.support.local import Application
from tests.support.otlp import OtlpReceiver

RUN_MS, TOKEN_US = 1.0, 2400.0
ORDINARY, LONG, POISON = "one", "long " * 250, "poison"
"""Their runs take 8, 600 and 8 ms; the last fails."""


@dataclass
class Sent:
    """What was asked for, and what came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    trace_ids: dict[str, list[str]] = field(default_factory=dict)
    """By the input."""


@asynccontextmanager
async def application(endpoint: str, monkeypatch: pytest.MonkeyPatch, **args: Any) -> AsyncIterator[httpx2.AsyncClient]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
    # The poisoned requests log their stack traces, hundreds of times.
    logging.getLogger("slowlens").setLevel(logging.CRITICAL)
    fake = {"base_ms": RUN_MS, "per_token_us": TOKEN_US, "poison_token": fake_token_id("poison")}
    app = Application(model={"engine": "fake", "name": "fake", "fake": fake}, **args)
    await app.start()
    try:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app.app), base_url="http://test") as client:
            yield client
    finally:
        await app.close()
        logging.getLogger("slowlens").setLevel(logging.NOTSET)


async def send(client: httpx2.AsyncClient, texts: Sequence[str], rate: float) -> Sent:
    """A request for each text, at random moments, ``rate`` of them a second."""
    chance, sent, loop = random.Random(1), Sent(), asyncio.get_running_loop()
    waiting: set[asyncio.Task[None]] = set()

    async def one(content: str) -> None:
        answer = await client.post("/v1/embeddings", json={"model": "fake", "input": content})
        sent.statuses[answer.status_code] += 1
        sent.trace_ids.setdefault(content, []).append(answer.headers["traceresponse"].split("-")[1])

    at = loop.time()
    for text in texts:
        waiting.add(asyncio.create_task(one(text)))
        at += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, at - loop.time()))
    await asyncio.gather(*waiting)
    return sent


class AllSpans(OtlpReceiver):
    """Writes every span that it receives to a file, as the Collector's file exporter would."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        super().__init__()

    def take_traces(self, request: Any) -> None:
        self._file.write(json.dumps(MessageToDict(request)) + "\n")

    def close(self) -> None:
        super().close()
        self._file.close()

"""What a caller's pod runs: clients with kept-alive connections, one JSON line for each request. Needs aiohttp only.

load.py URL CLIENTS RATE: ``RATE`` requests a second altogether, or with 0 each as soon as the one before was answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import aiohttp

TEXTS = ["hello world", *(" ".join(["why was it slow"] * count) for count in (1, 3, 8, 20))]
CLIENT_TIMEOUT_S = 90


async def first_answer(session: aiohttp.ClientSession, url: str) -> None:
    """Network policies may not know a new pod in its first moments: what is measured begins with an answer."""
    while True:
        try:
            async with session.post(url, json={"model": "all-MiniLM-L6-v2", "input": "hello"}) as response:
                if response.status == 200:
                    return
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.2)


async def client(session: aiohttp.ClientSession, url: str, number: int, interval_s: float) -> None:
    while True:
        began, told = time.time(), ""
        outcome: Any
        try:
            body = {"model": "all-MiniLM-L6-v2", "input": random.choice(TEXTS)}
            async with session.post(url, json=body) as response:
                text = await response.text()
                outcome, told = response.status, "" if response.status == 200 else text[:300]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome, told = type(error).__name__, str(error)[:300]
        took_s = time.time() - began
        line = {"client": number, "at": began, "s": round(took_s, 4), "outcome": outcome, "told": told}
        print(json.dumps(line), flush=True)
        await asyncio.sleep(max(0.0, interval_s - took_s) if interval_s else 0.05 * (outcome != 200))


async def main(url: str, clients: int, rate: float) -> None:
    timeout = aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await first_answer(session, url)
        interval_s = clients / rate if rate else 0
        await asyncio.gather(*(client(session, url, number, interval_s) for number in range(clients)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))

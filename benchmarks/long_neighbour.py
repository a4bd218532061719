"""What a long input costs the short ones that run with it: the incident of the README, to be made again.

With the application running (`serve run benchmarks/in_order.yaml`, and for comparison `serve run serve_config.yaml`):

    python benchmarks/long_neighbour.py

15 clients send a few words each, one sends 360, 12 times over. Prints how long the runs of the short ones took, and the
trace id of the one whose run took longest; `slowlens trace ID` draws it.
"""

from __future__ import annotations

import json
import re
import statistics
import urllib.request
from concurrent.futures import ThreadPoolExecutor

URL = "http://localhost:8000/v1/embeddings"
CLIENTS, REQUESTS = 16, 12
LONG = "a long one " * 120


def client(number: int) -> list[tuple[float, str]]:
    """``(forward in ms, trace id)`` of each request of one client; client 0 sends the long ones."""
    found = []
    for turn in range(REQUESTS):
        body = json.dumps({"input": LONG if number == 0 else f"short {number} {turn}"}).encode()
        request = urllib.request.Request(URL, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            answer.read()
            timing = re.search(r"forward;dur=([0-9.]+)", answer.headers["Server-Timing"])
            assert timing is not None
            found.append((float(timing[1]), answer.headers["traceresponse"].split("-")[1]))
    return found


def main() -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, range(CLIENTS)))
    short = [answer for answers_of_one in answers[1:] for answer in answers_of_one]
    median, (worst, trace_id) = statistics.median(ms for ms, _ in short), max(short)
    print(f"runs of the short ones: median {median:.0f} ms, worst {worst:.0f} ms, in trace {trace_id}")


if __name__ == "__main__":
    main()

"""How much memory the Collector takes for a trace that it has not decided on.

Sends the telemetry of real stages (in one process, on the fake engine) to a Collector with the shipped configuration
that decides on nothing, and prints what its memory grows by for each trace: of a request, or of a run of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.backends.running import collector
from tests.backends.traffic import ORDINARY, application, send

_RATE = 80.0
_HELD = "otelcol_processor_tail_sampling_sampling_traces_on_memory"
_MEMORY = "otelcol_process_memory_rss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    count: int = parser.parse_args().requests
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as monkeypatch,
        collector(Path(folder), "127.0.0.1:1", wait_s=3600) as running,
    ):

        async def drive() -> None:
            async with application(running.endpoint, monkeypatch) as client:
                for part in range(4):
                    await send(client, [ORDINARY] * (count // 4), _RATE)
                    traces, memory = running.own(_HELD), running.own(_MEMORY)
                    each_kb = (memory - begun) / max(1, traces) / 1e3
                    print(f"{part + 1}: {traces:,.0f} traces, {memory / 1e6:.0f} MB, {each_kb:.1f} KB a trace")

        begun = running.own(_MEMORY)
        asyncio.run(drive())


if __name__ == "__main__":
    main()

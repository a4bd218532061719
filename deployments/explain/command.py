"""``slowlens``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments import __version__
from deployments.config import TelemetryConfig
from deployments.explain.source import read
from deployments.explain.waterfall import find_trace, waterfall


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr where there is nothing to show."""
    options = _parser().parse_args(arguments)
    source = options.source or TelemetryConfig().store_directory()
    try:
        capture = read(source)
        trace = find_trace(capture.spans, options.trace_id)
    except (FileNotFoundError, LookupError) as error:
        print(f"slowlens: {error} (looked in {source})", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(waterfall(trace, capture.spans)))  # noqa: T201
    if capture.broken_lines:
        print(f"{capture.broken_lines} broken lines were passed over", file=sys.stderr)  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slowlens", description="Shows what a request did, from its traces.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    trace = commands.add_parser("trace", help="one request as a waterfall, with its batch")
    trace.add_argument(
        "trace_id", nargs="?", help="in hex, as in the header traceresponse; default: the newest request"
    )
    trace.add_argument("--source", type=Path, help="a file or folder of OTLP JSON lines; default: the local store")
    return parser

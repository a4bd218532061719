"""``slowlens``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments import __version__
from deployments.config import TelemetryConfig
from deployments.errors import ConfigError
from deployments.explain.source import read
from deployments.explain.waterfall import find_trace, waterfall


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with one line on stderr where there is nothing to show; 2 where the call is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows CONFIG is not ours to parse.
    own = 2 if len(given) > 1 and given[0] == "serve" and not given[1].startswith("-") else 1
    passed_on = given[own:] if given[:1] == ["serve"] and given[own:] not in (["-h"], ["--help"]) else []
    options = _parser().parse_args(given[: len(given) - len(passed_on)])
    if options.command == "serve":
        return _serve(options.config, passed_on)
    return _trace(options.trace_id, options.source or TelemetryConfig().store_directory())


def _serve(config: Path, rest: Sequence[str]) -> int:
    # Imported only here: the other commands must not wait for it.
    from deployments.launch import launch

    try:
        launch(config, rest)
    except ConfigError as error:
        print(f"slowlens: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _trace(trace_id: str | None, source: Path) -> int:
    try:
        capture = read(source)
        trace = find_trace(capture.spans, trace_id)
    except (FileNotFoundError, LookupError) as error:
        print(f"slowlens: {error} (looked in {source})", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(waterfall(trace, capture.spans)))  # noqa: T201
    if capture.broken_lines:
        print(f"{capture.broken_lines} broken lines were passed over", file=sys.stderr)  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slowlens", description="Transformer inference that can tell you why a request was slow."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve run, with the environment that makes Serve fast",
        description="Checks the configuration, sets the environment that makes Serve fast, and becomes `serve run`. "
        "Further arguments are passed on to it.",
        usage="slowlens serve [CONFIG] [arguments of serve run ...]",
    )
    serve.add_argument("config", nargs="?", type=Path, default=Path("serve_config.yaml"), metavar="CONFIG")
    trace = commands.add_parser("trace", help="one request as a waterfall, with its batch")
    trace.add_argument(
        "trace_id", nargs="?", help="in hex, as in the header traceresponse; default: the newest request"
    )
    trace.add_argument("--source", type=Path, help="a file or folder of OTLP JSON lines; default: the local store")
    return parser

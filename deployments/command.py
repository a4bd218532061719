"""``slowlens``: the command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deployments import __version__
from deployments.config import TelemetryConfig
from deployments.errors import ConfigError
from deployments.explain.backends import SourceError, backend, without_password
from deployments.explain.breakdown import NoRoot, break_down
from deployments.explain.capture import capture
from deployments.explain.report import as_json, as_text
from deployments.explain.source import TraceFiles
from deployments.explain.verdict import judge
from deployments.explain.waterfall import spent, waterfall


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with one line on stderr where there is nothing to show; 2 where the call is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows CONFIG is not ours to parse.
    own = 2 if len(given) > 1 and given[0] == "serve" and not given[1].startswith("-") else 1
    passed_on = given[own:] if given[:1] == ["serve"] and given[own:] not in (["-h"], ["--help"]) else []
    options = _parser().parse_args(given[: len(given) - len(passed_on)])
    if options.command == "serve":
        return _serve(options.config, passed_on)
    where = options.source or str(TelemetryConfig().store_directory())
    if options.command == "why":
        return _why(options, where)
    return _trace(options.trace_id, where)


def _serve(config: Path, rest: Sequence[str]) -> int:
    # Imported only here: the other commands must not wait for it.
    from deployments.launch import launch

    try:
        launch(config, rest)
    except ConfigError as error:
        print(f"slowlens: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _why(options: argparse.Namespace, where: str) -> int:
    try:
        if "://" in where:
            raise SourceError(f"why reads files only, and {without_password(where)} is a URL")
        source = TraceFiles(Path(where))
    except (FileNotFoundError, SourceError) as error:
        print(f"slowlens: {error}", file=sys.stderr)  # noqa: T201
        return 1
    since_ns = time.time_ns() - options.since_ns if options.since_ns is not None else 0
    found = capture(source.spans(), since_ns)
    if not found.requests:
        print(f"slowlens: there is no request in these traces (looked in {where})", file=sys.stderr)  # noqa: T201
        return 1
    verdict = judge(found, options.slowest)
    report = as_json(verdict) if options.format == "json" else "\n".join(as_text(verdict))
    if options.output is not None:
        options.output.write_text(report + "\n")
    else:
        print(report)  # noqa: T201
    if source.broken:
        print(f"{source.broken} broken lines or spans were passed over", file=sys.stderr)  # noqa: T201
    return 0


def _duration_ns(text: str) -> int:
    """``90s``, ``15m``, ``2h`` or ``1d``."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of s, m, h or d, as 15m")
    return int(number) * units[unit] * 10**9


def _share(text: str) -> float:
    """``5%`` as 0.05."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a percentage above 0% and below 100%, as 5%")
    return share


def _trace(trace_id: str | None, where: str) -> int:
    try:
        source = backend(where) if "://" in where else TraceFiles(Path(where))
        trace = source.trace(trace_id.lower() if trace_id is not None else source.newest())
        linked = source.linked(trace)
    except (FileNotFoundError, LookupError, SourceError) as error:
        print(f"slowlens: {error} (looked in {without_password(where)})", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(waterfall(trace, linked)))  # noqa: T201
    with contextlib.suppress(NoRoot):
        print("\n".join(["", *spent(break_down(trace))]))  # noqa: T201
    if source.broken:
        print(f"{source.broken} broken lines or spans were passed over", file=sys.stderr)  # noqa: T201
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
    why = commands.add_parser("why", help="why the slow requests were slow")
    why.add_argument("--source", metavar="PATH", help="a file or folder of OTLP JSON lines; default: the local store")
    why.add_argument(
        "--since",
        dest="since_ns",
        type=_duration_ns,
        metavar="15m",
        help="only requests that ended so long ago at most",
    )
    why.add_argument("--slowest", type=_share, default=0.05, metavar="5%", help="which requests are slow; default: 5%%")
    why.add_argument("--format", choices=("text", "json"), default="text")
    why.add_argument("-o", dest="output", type=Path, metavar="FILE", help="where to write; default: standard output")
    trace = commands.add_parser("trace", help="one request as a waterfall, with its batch")
    trace.add_argument(
        "trace_id", nargs="?", help="in hex, as in the header traceresponse; default: the newest request"
    )
    trace.add_argument(
        "--source",
        metavar="PATH|URL",
        help="a file or folder of OTLP JSON lines, or the URL of a Jaeger query service or of Tempo; "
        "default: the local store",
    )
    return parser

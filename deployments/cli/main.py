"""``slowlens``: the command line."""

from __future__ import annotations

import argparse
import os
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deployments import __version__
from deployments.cli.diagnose import NothingToShow, live, trace, why
from deployments.config import TelemetryConfig
from deployments.errors import ConfigError
from deployments.explain.options import Against, against, duration_s, factor, share, target_s

Value = TypeVar("Value")
_TRACE_ID_DIGITS = 32
_PORTS = (8000, 9000)
"""Of serve_config.yaml: HTTP and gRPC."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 1, with one line on stderr, if there is nothing to show; 2 if the call is invalid."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Arguments after CONFIG belong to ``serve run`` and are not parsed here.
    own = 2 if len(given) > 1 and given[0] == "serve" and not given[1].startswith("-") else 1
    passed_on = given[own:] if given[:1] == ["serve"] and given[own:] not in (["-h"], ["--help"]) else []
    commands = parser()
    options = commands.parse_args(given[: len(given) - len(passed_on)])
    if options.command == "serve":
        return _serve(options.config, passed_on)
    if options.command == "drain":
        from deployments.cli.drain import run

        return run(options.deadline_s, options.ports or _PORTS)
    try:
        if options.command == "doctor":
            from deployments.cli.examine import doctor

            return doctor(options.namespace, options.context, options.format)
        _ask(options, options.source or str(TelemetryConfig().store_directory()))
        sys.stdout.flush()
    except ConfigError as error:
        commands.error(str(error))
    except NothingToShow as error:
        print(f"slowlens: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:
        # The reader closed the pipe (`| head`); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _ask(options: argparse.Namespace, where: str) -> None:
    match options.command:
        case "why":
            now_ns = time.time_ns()
            since_ns = _since_ns(options, now_ns)
            then = _against(options, now_ns)
            if then is not None and then.source is None and then.cluster is None and options.since_s is None:
                since_ns = int(then.until_ns)
            form = options.slowest, options.format, options.output
            why(where, since_ns, *form, then, options.model, options.metrics, options.cluster)
        case "what-if":
            _what_if(options, where)
        case "trace":
            trace(options.trace_id, where)
        case "live":
            live(where, options.since_s, options.slowest, options.every_s, options.model, options.metrics)


def _since_ns(options: argparse.Namespace, now_ns: int) -> int:
    return now_ns - options.since_s * 10**9 if options.since_s is not None else 0


def _against(options: argparse.Namespace, now_ns: int) -> Against | None:
    """Raises ConfigError."""
    if options.cluster is not None and options.metrics is not None:
        raise ConfigError("argument --cluster: not with --metrics, which counts all clusters together")
    if options.against is None:
        return None
    try:
        return against(options.against, options.since_s, now_ns)
    except ValueError as error:
        raise ConfigError(f"argument --against: {error}") from None


def _what_if(options: argparse.Namespace, where: str) -> None:
    # Imported only here so that the other commands do not wait for it.
    from deployments.cli.predict import Asked, predict

    asked = Asked(tuple(options.changes), tuple(options.replicas), options.rate, options.search, options.target_p99_s)
    predict(where, _since_ns(options, time.time_ns()), asked, options.format, options.model, options.metrics)


def _serve(config: Path, rest: Sequence[str]) -> int:
    # Imported only here so that the other commands do not wait for it.
    from deployments.cli.serve import launch

    try:
        return launch(config, rest)
    except ConfigError as error:
        print(f"slowlens: {error}", file=sys.stderr)  # noqa: T201
        return 2


def _argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Wrap ``parse`` so that its own message for an invalid value is shown; argparse would only name the type."""

    def told(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return told


def _trace_id(text: str) -> str:
    """Raises ValueError."""
    if len(text) != _TRACE_ID_DIGITS or not set(text) <= set(string.hexdigits):
        raise ValueError(f"{text!r} must be a trace id, {_TRACE_ID_DIGITS} hexadecimal digits")
    return text


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="slowlens", description="Transformer inference that can tell you why a request was slow."
    )
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="start `serve run` with the environment that makes Serve fast",
        description="Checks the configuration, sets the environment that makes Serve fast, and runs `serve run` until "
        "it ends. Further arguments are passed to it.",
        usage="slowlens serve [CONFIG] [arguments of serve run ...]",
    )
    serve.add_argument("config", nargs="?", type=Path, default=Path("serve_config.yaml"), metavar="CONFIG")
    leaving = commands.add_parser(
        "drain",
        help="take this node of a Ray cluster out of service, before it is stopped",
        description="On a worker: Serve starts its replicas elsewhere, or lets them answer what they have; clients are "
        "told to connect anew. Waits until no replica and no connection is left. The only worker goes on until another "
        "one serves. On the head: waits until no worker is being drained.",
    )
    leaving.add_argument(
        "--deadline-s",
        type=float,
        default=700,
        metavar="SECONDS",
        help="when to give up (700). Replicas for which there is no place end so long before it as Serve's "
        "`graceful_shutdown_timeout_s` (605)",
    )
    leaving.add_argument(
        "--port",
        dest="ports",
        type=int,
        action="append",
        metavar="PORT",
        help="where clients connect, HTTP first; may be repeated (8000 and 9000)",
    )
    patient = commands.add_parser(
        "doctor",
        help="say what is wrong with slowlens on a Kubernetes cluster",
        description="Reads from the API server, with kubectl and its configuration, and changes nothing. The exit "
        "status is 1 if something is wrong.",
    )
    patient.add_argument(
        "-n", "--namespace", default="slowlens", metavar="NAME", help="where it was applied (slowlens)"
    )
    patient.add_argument("--context", metavar="NAME", help="of kubectl's configuration; default: its current one")
    patient.add_argument("--format", choices=("text", "json"), default="text")
    verdict = commands.add_parser("why", help="explain why the slow requests were slow")
    _add_source(verdict)
    _add_model(verdict)
    _add_cluster(verdict)
    _add_metrics(verdict)
    _add_window(verdict, None)
    verdict.add_argument(
        "--against",
        metavar="WINDOW|PATH|URL|cluster:NAME",
        help="say what takes longer than in another period: `1d`, the same period a day earlier, "
        "`2026-11-25T10:00Z..2026-11-25T11:00Z` (without --since: with all that came after it), than everything of "
        "another source, or than what another Ray cluster did (the old one of an upgrade)",
    )
    verdict.add_argument("--format", choices=("text", "json", "html"), default="text")
    verdict.add_argument("-o", dest="output", type=Path, metavar="FILE", help="output file; default: standard output")
    one = commands.add_parser("trace", help="show one request as a waterfall, with its batch")
    one.add_argument(
        "trace_id",
        nargs="?",
        type=_argument(_trace_id),
        help="in hex, as in the traceresponse header; default: the newest request",
    )
    _add_source(one)
    other = commands.add_parser(
        "what-if",
        help="predict what other settings would have done",
        description="Serves the recorded requests again, in virtual time, through the real queue, planner and "
        "autoscaling policy, with other settings.",
    )
    other.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="such as batching.max_batch_size=64")
    other.add_argument(
        "--replicas", action="append", default=[], metavar="DEPLOYMENT=N", help="a fixed number of them: Model=3"
    )
    other.add_argument("--rate", type=_argument(factor), default=1.0, metavar="X", help="so many times the requests/s")
    other.add_argument(
        "--search", action="store_true", help="look for the settings that keep --target-p99 at the least cost"
    )
    other.add_argument("--target-p99", dest="target_p99_s", type=_argument(target_s), metavar="300ms")
    _add_source(other)
    _add_model(other)
    _add_metrics(other)
    _add_since(other, None)
    other.add_argument("--format", choices=("text", "json"), default="text")
    again = commands.add_parser("live", help="repeat `why` while the server runs")
    _add_source(again)
    _add_model(again)
    _add_metrics(again)
    _add_window(again, 300)
    again.add_argument(
        "--every", dest="every_s", type=_argument(duration_s), default=5, metavar="5s", help="default: 5s"
    )
    return root


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source",
        metavar="PATH|URL",
        help="a file or folder of OTLP JSON lines, or the URL of a Jaeger query service or of Tempo; "
        "default: the local store",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME", help="only requests of this model; default: of all")


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cluster", metavar="NAME", help="only what this Ray cluster did (KubeRay's RayCluster); default: all of them"
    )


def _add_metrics(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metrics",
        metavar="URL",
        help="a Prometheus that scrapes the same processes: say also what they counted, and what telemetry was lost",
    )


def _add_since(command: argparse.ArgumentParser, since_s: int | None) -> None:
    what = "all requests (from a server: the last hour)" if since_s is None else f"{since_s // 60}m"
    command.add_argument(
        "--since",
        dest="since_s",
        type=_argument(duration_s),
        default=since_s,
        metavar="15m",
        help=f"only requests that ended within this period; default: {what}",
    )


def _add_window(command: argparse.ArgumentParser, since_s: int | None) -> None:
    _add_since(command, since_s)
    command.add_argument(
        "--slowest",
        type=_argument(share),
        default=0.05,
        metavar="5%",
        help="share of the requests that count as slow; default: 5%%",
    )

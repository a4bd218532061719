"""``slowlens why``, ``trace`` and ``live`` in a terminal: run the query and write the result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from deployments.explain.counted import counter_at
from deployments.explain.options import Against
from deployments.explain.render.html import as_html
from deployments.explain.render.sample import ON_THEIR_WAY
from deployments.explain.render.text import as_json, as_text
from deployments.explain.render.waterfall import member_traces, members, spent, waterfall
from deployments.explain.requests.breakdown import break_down
from deployments.explain.requests.request import split
from deployments.explain.traces.files import Source, TraceFiles
from deployments.explain.traces.open import part_of, source_at
from deployments.explain.traces.parts import NoSuchPart
from deployments.explain.traces.servers.http_api import SourceError, without_password
from deployments.explain.verdict import Verdict, examine

Format = Literal["text", "json", "html"]
_WIDTH = 120
"""Width of text that is not written to a terminal."""
_LONG_BYTES = 20_000_000
"""Size above which a terminal shows the progress of reading."""


class NothingToShow(Exception):
    """There are no traces, the requested ones are missing, or the source does not respond."""


def why(
    where: str,
    since_ns: int,
    slowest: float,
    form: Format,
    output: Path | None,
    against: Against | None = None,
    model: str | None = None,
    metrics: str | None = None,
    cluster: str | None = None,
) -> None:
    """Raises NothingToShow."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(opened(where, model, cluster))
        then = None
        if against is not None:
            is_same = against.source is None and against.cluster is None
            elsewhere = against.source or where, model, against.cluster
            other = source if is_same else stack.enter_context(opened(*elsewhere))
            then = other, against.since_ns, against.until_ns
        verdict = examine(source, slowest, since_ns, then, counter_at(metrics, model))
        if then is None and any(finding.fix.changes for finding in verdict.findings):
            # Imported only here so that a verdict without a setting to change does not wait for it.
            from deployments.simulate.fixes import predict_fixes

            predict_fixes(verdict, source, since_ns)
    if not verdict.capture.survey.requests:
        late = f"; a Collector that samples passes a trace on when it has decided ({ON_THEIR_WAY}), and only some"
        raise NothingToShow(
            f"there is no request in these traces (looked in {without_password(where)})"
            + (late if source.is_server else "")
        )
    if verdict.against is not None and not verdict.against.capture.survey.requests:
        raise NothingToShow("there is no request in the period to compare with")
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(output.open("w", encoding="utf-8")) if output is not None else sys.stdout
            _write(verdict, form, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NothingToShow(f"cannot write {output or 'standard output'}: {error.strerror}") from None
    _say_what_is_broken(source)


def _write(verdict: Verdict, form: Format, file: IO[str]) -> None:
    match form:
        case "text":
            print_rich(as_text(verdict), file)
        case "json":
            print(as_json(verdict), file=file)
        case "html":
            print(as_html(verdict), file=file)


def trace(trace_id: str | None, where: str) -> None:
    """Raises NothingToShow."""
    with opened(where) as source:
        try:
            spans = source.trace(trace_id.lower() if trace_id is not None else source.newest())
        except LookupError as error:
            raise NothingToShow(f"{error} (looked in {without_password(where)})") from None
        linked = source.linked(spans)
        beside = source.traces(member_traces(linked))
    lines = [*waterfall(spans, linked), *members(spans[0].trace_id, linked, beside)]
    for request in split(spans):
        lines += ["", *spent(break_down(request))]
    # At full width: a terminal wraps lines, a pipe must not.
    _console(sys.stdout).print(Text("\n".join(lines)), soft_wrap=True)
    _say_what_is_broken(source)


def live(
    where: str, since_s: int, slowest: float, every_s: float, model: str | None = None, metrics: str | None = None
) -> None:
    """Repeat ``why`` until interrupted. Raises NothingToShow if the source is a server that does not respond."""
    console = _console(sys.stdout)
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=False) as shown:
        while True:
            begun = time.monotonic()
            newest = _now(where, since_s, slowest, model, metrics)
            if console.is_terminal:
                shown.update(newest, refresh=True)
            else:
                print_rich(newest, sys.stdout)
                sys.stdout.flush()
            # Reading a large store must not take up a whole CPU that the server needs.
            time.sleep(max(every_s, 3 * (time.monotonic() - begun)))


def _now(where: str, since_s: int, slowest: float, model: str | None, metrics: str | None) -> RenderableType:
    now_ns = time.time_ns()
    try:
        source = source_at(where, model)
        verdict = examine(source, slowest, now_ns - since_s * 10**9, count=counter_at(metrics, model))
    except FileNotFoundError:
        return Text(f"no traces at {where} yet")
    except NoSuchPart as error:
        return Text(str(error))
    except SourceError as error:
        raise NothingToShow(str(error)) from None
    if not verdict.capture.survey.requests:
        return Text(f"no request in the last {since_s} s")
    return as_text(verdict)


# --- sources and consoles --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(where: str, model: str | None = None, cluster: str | None = None) -> Iterator[Source]:
    """Open a source, or a part of it, with a progress bar on a terminal while a long file is read.

    Raises NothingToShow.
    """
    console = Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), DownloadColumn())
    try:
        source = source_at(where)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            if isinstance(source, TraceFiles):
                task = progress.add_task("", visible=False)
                source.on_progress = lambda done, total: progress.update(
                    task, completed=done, total=total, visible=total > _LONG_BYTES
                )
            yield part_of(source, model, cluster)
    except (OSError, SourceError, NoSuchPart) as error:
        raise NothingToShow(f"{error} (looked in {without_password(where)})") from None


def print_rich(content: RenderableType, file: IO[str]) -> None:
    console = _console(file)
    if console.is_terminal:
        console.print(content)
        return
    # Tables pad their lines with spaces, which do not belong in a file.
    with console.capture() as written:
        console.print(content)
    file.writelines(f"{line.rstrip()}\n" for line in written.get().splitlines())


def _console(file: IO[str]) -> Console:
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _say_what_is_broken(source: Source) -> None:
    if source.broken:
        print(f"{source.broken} broken lines or spans were skipped", file=sys.stderr)  # noqa: T201

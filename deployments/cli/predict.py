"""``slowlens what-if`` in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.cli.diagnose import NothingToShow, opened, print_rich
from deployments.errors import ConfigError
from deployments.explain.counted import counter_at
from deployments.explain.render.sample import by_metrics
from deployments.simulate.recording import NotReplayable, record
from deployments.simulate.settings import parse_change
from deployments.simulate.what_if import MODEL_REPLICAS, as_json, as_text, search, what_if


@dataclass(frozen=True, slots=True)
class Asked:
    changes: tuple[str, ...]
    """As ``KEY=VALUE``."""
    replicas: tuple[str, ...]
    """As ``DEPLOYMENT=N``."""
    rate: float
    is_search: bool
    target_p99_s: float | None

    def by_key(self) -> dict[str, Any]:
        """Raises ConfigError."""
        found = dict(map(parse_change, self.changes))
        for text in self.replicas:
            deployment, _, count = text.partition("=")
            if deployment != "Model" or not count.isdecimal():
                raise ConfigError(
                    f"argument --replicas: {text!r} must be Model=N; the other stages are taken to need what they did"
                )
            found[MODEL_REPLICAS] = int(count)
        return found


def predict(
    where: str,
    since_ns: int,
    asked: Asked,
    form: Literal["text", "json"],
    model: str | None = None,
    metrics: str | None = None,
) -> None:
    """Raises ConfigError, NothingToShow."""
    changes = asked.by_key()
    if asked.is_search != (asked.target_p99_s is not None):
        raise ConfigError("--search and --target-p99 belong together")
    if asked.is_search and changes:
        raise ConfigError("--search looks for the settings; it takes none")
    if not asked.is_search and not changes and asked.rate == 1:
        raise ConfigError("say what to change: KEY=VALUE, --replicas or --rate; or --search")
    with opened(where, model) as source:
        try:
            recording = record(source, since_ns)
            count = counter_at(metrics, model)
            counted = count(recording.window_ns, time.time()) if count is not None else None
            if asked.target_p99_s is not None:
                found = search(recording, asked.target_p99_s * 1e3, asked.rate, _say_try)
            else:
                found = what_if(recording, changes, asked.rate)
        except NotReplayable as error:
            raise NothingToShow(str(error)) from None
    if found is None:
        raise NothingToShow(
            f"no settings were found that keep p99 at {asked.target_p99_s} s; what is beside the model stays"
        )
    if form == "json":
        print(as_json(found, counted))  # noqa: T201
        return
    print_rich(as_text(found), sys.stdout)
    for line in by_metrics(counted):
        print(line)  # noqa: T201


def _say_try(changes: Mapping[str, Any]) -> None:
    if sys.stderr.isatty():
        tried = ", ".join(f"{key}={value}" for key, value in changes.items())
        print(f"\rtrying {tried:100}", end="", file=sys.stderr, flush=True)  # noqa: T201

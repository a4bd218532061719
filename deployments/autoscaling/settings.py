"""The policy's arguments: ``policy_kwargs`` in serve_config.yaml. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

POLICY = "deployments.autoscaling:QueueWaitPolicy"
"""The policy's name in serve_config.yaml."""
_KEY = "autoscaling_config.policy.policy_kwargs"
_LARGEST = 1e12


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """See ``policy.QueueWaitPolicy``."""

    target_queue_wait_ms: float
    target_utilization: float = 0.8
    quiet_s: float = 60.0
    stale_s: float = 10.0
    telemetry_directory: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> PolicySettings:
        """Parse the arguments. Raises ValueError with a line per invalid key: the key, the rule and the value."""
        problems = list(_problems(given))
        if problems:
            raise ValueError("\n  ".join(problems))
        return cls(**given)


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    known = [one.name for one in fields(PolicySettings)]
    for key in given:
        if key not in known:
            yield f"{_KEY}.{key}: unknown key; known here: {', '.join(known)}"
    if "target_queue_wait_ms" not in given:
        yield f"{_KEY}.target_queue_wait_ms: must be given: the accepted wait, in milliseconds"
    rules: dict[str, tuple[str, Callable[[float], bool]]] = {
        "target_queue_wait_ms": ("above 0", lambda value: value / 1e3 > 0),
        "target_utilization": ("above 0 and at most 1", lambda value: 0 < value <= 1),
        "quiet_s": ("0 or more", lambda value: value >= 0),
        "stale_s": ("above 0", lambda value: value > 0),
    }
    for key, (rule, is_right) in rules.items():
        value = given.get(key, 1)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
        if not (is_number and is_right(value)):
            yield f"{_KEY}.{key}: must be a number {rule}; got {value!r}"
    directory = given.get("telemetry_directory")
    if not isinstance(directory, str | None):
        yield f"{_KEY}.telemetry_directory: must be a path; got {directory!r}"

"""The settings that a replay knows: as they were, and changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deployments.autoscaling.settings import PolicySettings
from deployments.config import AppConfig, BatchingConfig
from deployments.errors import ConfigError

_MODEL = "deployments.Model"
_REPLICAS, _ONGOING = f"{_MODEL}.num_replicas", f"{_MODEL}.max_ongoing_requests"
_MIN, _MAX = f"{_MODEL}.autoscaling_config.min_replicas", f"{_MODEL}.autoscaling_config.max_replicas"
_POLICY = f"{_MODEL}.autoscaling_config.policy.policy_kwargs."
_POLICY_KEYS = ("target_queue_wait_ms", "target_utilization", "quiet_s")
_ARGS = (
    *(f"batching.{key}" for key in BatchingConfig.model_fields),
    "limits.max_input_chars",
    "limits.default_timeout_ms",
    "model.max_length",
)
KEYS = (*_ARGS, _REPLICAS, _ONGOING, _MIN, _MAX, *(_POLICY + key for key in _POLICY_KEYS))
"""Whose effect is predicted."""
_ALL_AT_ONCE = 4000


@dataclass(frozen=True, slots=True)
class Settings:
    config: AppConfig
    min_replicas: int
    max_replicas: int
    """Equal if the number of model replicas is fixed."""
    max_ongoing_requests: int
    policy: Mapping[str, float]
    """``policy_kwargs``; empty without our policy."""
    max_length: int | None

    @property
    def is_scaled(self) -> bool:
        return bool(self.policy) and self.min_replicas < self.max_replicas


def parse_change(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``, the value as in YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} must be KEY=VALUE, such as batching.max_batch_size=64")
    key = key.strip().removeprefix("args.")
    if key not in KEYS:
        raise ConfigError(f"{key}: its effect cannot be predicted; known here: {', '.join(KEYS)}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    return key, parsed


def settings_of(known: Mapping[str, Any], replicas: int, changes: Mapping[str, Any]) -> Settings:
    """Return the settings of a recording with ``changes``, both by key. Raises ConfigError, naming the key.

    Args:
        known: what the processes reported; what they did not has its default.
        replicas: how many model replicas served.
        changes: by key.
    """
    merged = {**known, **changes}
    if _REPLICAS in changes:
        # A fixed number, whatever scaled it before.
        for key in (_MIN, _MAX):
            merged.pop(key, None)
    sections: dict[str, dict[str, Any]] = {}
    for key in _ARGS:
        if key in merged:
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = merged[key]
    # Its other limits are of no concern here, and may be those of a larger queue.
    sections.setdefault("limits", {})["max_inputs"] = 1
    config = AppConfig.parse(sections)
    fixed = _whole(_REPLICAS, merged.get(_REPLICAS, replicas), 1)
    least, most = (_whole(key, merged.get(key, fixed), low) for key, low in ((_MIN, 0), (_MAX, 1)))
    if least > most:
        raise ConfigError(f"{_MIN} ({least}) must be at most {_MAX} ({most})")
    policy = {key: merged[_POLICY + key] for key in _POLICY_KEYS if _POLICY + key in merged}
    if policy:
        try:
            PolicySettings.parse(policy)
        except ValueError as error:
            raise ConfigError(f"{_MODEL}.{error}") from None
    elif least < most:
        # Who scaled it, and when, is not known.
        least = most = max(least, min(most, replicas))
    return Settings(
        config,
        least,
        most,
        _whole(_ONGOING, merged.get(_ONGOING, _ALL_AT_ONCE), 1),
        policy,
        config.model.max_length,
    )


def changed(known: Mapping[str, Any], replicas: int, changes: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The value of each changed key before and after; None for what was not reported."""
    defaults = {f"batching.{key}": getattr(BatchingConfig(), key) for key in BatchingConfig.model_fields}
    before = {**defaults, **known}
    if _MIN not in known:
        before.setdefault(_REPLICAS, replicas)
    return {key: [before.get(key), value] for key, value in changes.items()}


def _whole(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}: must be a whole number of at least {least}; got {value!r}")
    return value

"""API keys: who may call, as which tenant, with which share.

A key is sent as OpenAI's clients do, ``Authorization: Bearer KEY``. What is configured is its hash, so that a copy of
the file opens nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from deployments.config import Section
from deployments.errors import ConfigError, InvalidField, Unauthorized
from deployments.messages import Share

Priority = Literal["interactive", "batch"]
_PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")
_VARIABLE = "env:"
_LOOK_S = 1.0
"""How often the file is looked at."""
_MAX_KEYS = 1000
"""Tenants are attributes of metrics."""
_MAX_KEY_CHARS = 1024
_logger = logging.getLogger("slowlens.ingress")


class ApiKey(Section):
    """One entry of the list."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(description="The tenant.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] = Field(description="SHA-256 of the key, in hex.")
    weight: Annotated[float, Field(ge=0.01, le=100)] = Field(1.0, description="Its share of the device.")
    priorities: tuple[Priority, ...] = Field(
        _PRIORITIES, strict=False, description="What `X-Priority` may be; the first is the default."
    )


_LIST = TypeAdapter(Annotated[list[ApiKey], Field(min_length=1, max_length=_MAX_KEYS)])


class ApiKeys:
    """The keys of a file, read again when it changes, or of a variable.

    Raises ConfigError if they cannot be read.

    Args:
        where: a path, or ``env:NAME``; None: nobody needs a key.
        param: of the configuration, for messages.
        clock: monotonic seconds.
    """

    def __init__(
        self, where: str | None, param: str = "args.security.api_keys", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._where, self._param, self._clock = where, param, clock
        self._keys: dict[bytes, ApiKey] = {}
        self._seen: tuple[int, ...] = ()
        self._look_at_s = 0.0
        if where is not None:
            self._seen, self._keys = self._signature(), self._read(where)

    @property
    def are_needed(self) -> bool:
        return self._where is not None

    def share_of(self, headers: Mapping[str, str]) -> Share:
        """The share of the caller. Raises Unauthorized, or InvalidField if X-Priority is none that it may use."""
        wanted = headers.get("x-priority")
        if wanted is not None and wanted not in _PRIORITIES:
            raise InvalidField(
                f"X-Priority must be one of {', '.join(_PRIORITIES)}; got {wanted[:80]!r}", param="X-Priority"
            )
        if not self.are_needed:
            return Share(priority=_PRIORITIES.index(wanted or "interactive"))
        key = self._key_of(headers)
        if wanted is not None and wanted not in key.priorities:
            raise InvalidField(
                f"X-Priority may be {' or '.join(key.priorities)} with the key {key.name!r}; got {wanted!r}",
                param="X-Priority",
            )
        return Share(key.name, key.weight, _PRIORITIES.index(wanted or key.priorities[0]))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized."""
        if self.are_needed:
            self._key_of(headers)

    def _key_of(self, headers: Mapping[str, str]) -> ApiKey:
        self._look()
        key = _sent(headers.get("authorization", ""))
        if not key:
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(key.encode()).digest()
        # The hash of a key that is not there says nothing of those that are, whatever the lookup takes.
        found = self._keys.get(digest)
        if found is None or not hmac.compare_digest(bytes.fromhex(found.sha256), digest):
            raise Unauthorized("the API key is not known")
        return found

    # --- reading ---

    def _look(self) -> None:
        """Read the file again if it has changed; what cannot be read changes nothing."""
        now_s = self._clock()
        if self._where is None or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + _LOOK_S
        try:
            seen = self._signature()
            if seen != self._seen:
                self._seen = seen
                self._keys = self._read(self._where)
                _logger.info("%s: %d keys", self._param, len(self._keys))
        except ConfigError as error:
            _logger.error("the keys stay as they are: %s", error)

    def _signature(self) -> tuple[int, ...]:
        if self._where is None or self._where.startswith(_VARIABLE):
            return ()
        try:
            status = Path(self._where).expanduser().stat()
        except OSError as error:
            raise ConfigError(f"{self._param}: {self._where}: {error.strerror}") from None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self, where: str) -> dict[bytes, ApiKey]:
        try:
            if where.startswith(_VARIABLE):
                name = where.removeprefix(_VARIABLE)
                if name not in os.environ:
                    raise ConfigError(f"{self._param}: there is no variable {name}")
                text = os.environ[name]
            else:
                text = Path(where).expanduser().read_text("utf-8")
            keys = _LIST.validate_python(yaml.safe_load(text))
        except OSError as error:
            raise ConfigError(f"{self._param}: {where}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ConfigError(f"{self._param}: {where} is not YAML") from None
        except ValidationError as error:
            raise ConfigError(f"{self._param}: {where}: {_problem(error)}") from None
        names = [key.name for key in keys]
        twice = next((name for name in names if names.count(name) > 1), None)
        found = {bytes.fromhex(key.sha256): key for key in keys}
        if len(found) < len(keys):
            raise ConfigError(f"{self._param}: {where}: two entries have the same key")
        if twice is not None and len({key.weight for key in keys if key.name == twice}) > 1:
            raise ConfigError(f"{self._param}: {where}: entries of the same name, {twice!r}, differ in weight")
        return found


def _sent(authorization: str) -> str:
    """The key in a header: of a program, or as the password that a browser has asked for."""
    kind, _, rest = authorization.partition(" ")
    rest = rest.strip()[:_MAX_KEY_CHARS]
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return rest if kind.lower() == "bearer" else ""


def _problem(error: ValidationError) -> str:
    """Where the list is wrong, without its values."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{place or 'the list'}: {first['msg']}"

"""How two actors that never met agree on a version and prove that they belong together. Pure functions of bytes.

1. The caller's HELLO names the versions that it speaks and carries a nonce.
2. The replica's CHALLENGE names the version chosen, carries a nonce of its own, and proves that the replica knows the
   secret: an HMAC-SHA256 over both nonces.
3. The caller's PROOF is the same with another label, so that neither proof can be sent back as the other.
4. The replica's WELCOME tells what the replica can take.

The secret never crosses the connection. It is the replica's own, made when it starts; Serve hands it to the replica's
callers along with its address (``discovery``). The proofs say who is there at the beginning; like Serve's own
connections, the frames that follow are neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, TypeVar

import msgspec

VERSIONS = (1, 2)
"""Versions of the protocol that this code speaks: of the frames and of the schema of ``messages``. Since 2 there is
KEEP."""
SINCE_KEEP = 2
_NONCE_BYTES = 16
_MAGIC = "slowlens"
Part = TypeVar("Part", bound=msgspec.Struct)


class HandshakeError(Exception):
    """The peer is not who it should be, or speaks no version that is spoken here. The message names no secret."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    magic: str
    versions: tuple[int, ...]
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True):
    version: int
    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True):
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    max_ongoing_requests: int
    """Calls that the replica takes at once, from all of its callers."""


def new_secret() -> str:
    return secrets.token_hex(32)


class Caller:
    """The caller's side of one handshake."""

    def __init__(self, secret: str, versions: tuple[int, ...] = VERSIONS) -> None:
        self._secret, self._versions = secret, versions
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.version = 0
        """The one that was chosen; 0 before."""

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(Hello(_MAGIC, self._versions, self._nonce))

    def proof(self, challenge: bytes | memoryview) -> bytes:
        """Answer the replica's challenge. Raises HandshakeError if the replica does not know the secret."""
        asked = _parse(challenge, Challenge)
        if asked.version not in self._versions:
            raise HandshakeError(f"the replica chose version {asked.version}, which this caller does not speak")
        if not hmac.compare_digest(asked.proof, _mac(self._secret, "replica", self._nonce, asked.nonce)):
            raise HandshakeError("the replica does not know the secret that Serve announced for it")
        self.version = asked.version
        return msgspec.msgpack.encode(Proof(_mac(self._secret, "caller", self._nonce, asked.nonce)))


class Replica:
    """The replica's side of one handshake."""

    def __init__(self, secret: str, versions: tuple[int, ...] = VERSIONS) -> None:
        self._secret, self._versions = secret, versions
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._callers_nonce = b""
        self.version = 0
        """The one that was chosen; 0 before."""

    def challenge(self, hello: bytes | memoryview) -> bytes:
        """Answer a caller's hello. Raises HandshakeError if they have no version in common."""
        said = _parse(hello, Hello)
        if said.magic != _MAGIC or len(said.nonce) != _NONCE_BYTES:
            raise HandshakeError("this is not a hello of slowlens")
        common = set(said.versions) & set(self._versions)
        if not common:
            raise HandshakeError(
                f"the caller speaks the versions {sorted(said.versions)} of the protocol, this replica "
                f"{sorted(self._versions)}"
            )
        self._callers_nonce, self.version = said.nonce, max(common)
        proof = _mac(self._secret, "replica", self._callers_nonce, self._nonce)
        return msgspec.msgpack.encode(Challenge(self.version, self._nonce, proof))

    def check(self, proof: bytes | memoryview) -> None:
        """Check the caller's proof. Raises HandshakeError."""
        expected = _mac(self._secret, "caller", self._callers_nonce, self._nonce)
        if not self._callers_nonce or not hmac.compare_digest(_parse(proof, Proof).proof, expected):
            raise HandshakeError("the caller does not know the secret of this replica")


def _mac(secret: str, label: str, callers_nonce: bytes, replicas_nonce: bytes) -> bytes:
    message = label.encode() + b"\0" + callers_nonce + replicas_nonce
    return hmac.digest(secret.encode(), message, hashlib.sha256)


def _parse(data: bytes | memoryview, kind: type[Part]) -> Part:
    try:
        parsed: Any = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise HandshakeError("a part of the handshake is malformed") from None
    return parsed  # type: ignore[no-any-return]


def welcome(max_ongoing_requests: int) -> bytes:
    return msgspec.msgpack.encode(Welcome(max_ongoing_requests))


def parse_welcome(data: bytes | memoryview) -> Welcome:
    return _parse(data, Welcome)

"""Who may connect: both ends know the secret, and speak a common version."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.transport.handshake import (
    Caller,
    Challenge,
    HandshakeError,
    Proof,
    Replica,
    new_secret,
    parse_welcome,
    welcome,
)

SECRET = new_secret()


def test_both_ends_prove_the_secret_without_sending_it() -> None:
    caller, replica = Caller(SECRET), Replica(SECRET)
    hello = caller.hello()
    challenge = replica.challenge(hello)
    proof = caller.proof(challenge)
    replica.check(proof)

    assert all(SECRET.encode() not in part for part in (hello, challenge, proof))
    assert parse_welcome(welcome(7)).max_ongoing_requests == 7


def test_a_replica_with_another_secret_is_refused() -> None:
    caller = Caller(SECRET)
    with pytest.raises(HandshakeError, match="the replica does not know the secret"):
        caller.proof(Replica(new_secret()).challenge(caller.hello()))


def test_a_caller_with_another_secret_is_refused() -> None:
    replica = Replica(SECRET)
    challenge = msgspec.msgpack.decode(replica.challenge(Caller(SECRET).hello()), type=Challenge)
    for proof in (b"", bytes(32), challenge.proof):
        with pytest.raises(HandshakeError, match="the caller does not know the secret"):
            replica.check(msgspec.msgpack.encode(Proof(proof)))


def test_a_proof_counts_for_its_own_connection_only() -> None:
    caller = Caller(SECRET)
    proof = caller.proof(Replica(SECRET).challenge(caller.hello()))
    other = Replica(SECRET)
    with pytest.raises(HandshakeError):
        other.check(proof)
    other.challenge(caller.hello())
    with pytest.raises(HandshakeError):
        other.check(proof)


def test_the_newest_common_version_is_chosen() -> None:
    replica = Replica(SECRET, (1, 2, 3))
    challenge = msgspec.msgpack.decode(replica.challenge(Caller(SECRET, (2, 1)).hello()), type=Challenge)
    assert challenge.version == 2


def test_ends_without_a_common_version_say_what_they_speak() -> None:
    with pytest.raises(HandshakeError, match=r"the caller speaks the versions \[2\].*this replica \[1\]"):
        Replica(SECRET, (1,)).challenge(Caller(SECRET, (2,)).hello())
    chosen_for_another = Replica(SECRET, (5,)).challenge(Caller(SECRET, (5,)).hello())
    with pytest.raises(HandshakeError, match="chose version 5"):
        Caller(SECRET, (1,)).proof(chosen_for_another)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for part in (Replica(SECRET).challenge, Caller(SECRET).proof, Replica(SECRET).check, parse_welcome):
        try:
            part(data)
        except HandshakeError:
            continue
        assert part is parse_welcome

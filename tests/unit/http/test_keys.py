"""API keys: who is let in, as whom, and what a wrong file says."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.errors import ConfigError, InvalidField, Unauthorized
from deployments.http.keys import ApiKeys
from deployments.messages import Share


def entry(key: str, name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


HASH = "a" * 64
ENTRIES = [
    entry("secret-a", "team-a"),
    entry("secret-b", "team-b", weight=2.5, priorities=["batch"]),
    entry("another-b", "team-b", weight=2.5, priorities=["batch", "interactive"]),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(ENTRIES))
    return path


def bearer(key: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **more}


def test_a_key_is_a_tenant_with_a_share(path: Path) -> None:
    keys = ApiKeys(str(path))
    assert keys.share_of(bearer("secret-a")) == Share("team-a", 1.0, 0)
    assert keys.share_of(bearer("secret-a", **{"x-priority": "batch"})) == Share("team-a", 1.0, 1)
    assert keys.share_of(bearer("secret-b")) == Share("team-b", 2.5, 1)
    assert keys.share_of(bearer("another-b", **{"x-priority": "interactive"})) == Share("team-b", 2.5, 0)
    with pytest.raises(InvalidField, match="X-Priority may be batch with the key 'team-b'; got 'interactive'"):
        keys.share_of(bearer("secret-b", **{"x-priority": "interactive"}))


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer ", "Bearer wrong", "secret-a", "Token secret-a", "Basic %%%", "Bearer \xff"]
)
def test_whoever_has_no_key_is_refused(path: Path, authorization: str) -> None:
    keys = ApiKeys(str(path))
    for ask in (keys.share_of, keys.check):
        with pytest.raises(Unauthorized) as refused:
            ask({"authorization": authorization})
        assert refused.value.status == 401
        assert "secret" not in refused.value.message


def test_a_browser_sends_the_key_as_a_password(path: Path) -> None:
    sent = base64.b64encode(b"whoever:secret-a").decode()
    ApiKeys(str(path)).check({"authorization": f"Basic {sent}"})


def test_without_keys_everybody_is_let_in() -> None:
    keys = ApiKeys(None)
    keys.check({})
    assert keys.share_of({"authorization": "Bearer whatever"}) == Share()
    assert keys.share_of({"x-priority": "batch"}) == Share(priority=1)
    with pytest.raises(InvalidField, match="interactive, batch; got 'urgent'"):
        keys.share_of({"x-priority": "urgent"})


def test_a_file_that_changes_is_read_again_and_a_broken_one_changes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    keys = ApiKeys(str(path), clock=lambda: now_s)
    keys.check(bearer("secret-a"))
    path.write_text(yaml.safe_dump([entry("new", "team-c")]))
    keys.check(bearer("secret-a"))
    now_s = 2.0
    assert keys.share_of(bearer("new")).tenant == "team-c"
    with pytest.raises(Unauthorized):
        keys.check(bearer("secret-a"))

    with caplog.at_level(logging.ERROR):
        now_s = 4.0
        path.write_text("- name: [")
        keys.check(bearer("new"))
        now_s = 6.0
        path.unlink()
        keys.check(bearer("new"))
    assert "the keys stay as they are: args.security.api_keys" in caplog.text


def test_a_variable_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", yaml.safe_dump(ENTRIES))
    assert ApiKeys("env:KEYS").share_of(bearer("secret-a")).tenant == "team-a"
    assert "secret-a" not in os.environ["KEYS"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "the list: List should have at least 1 item"),
        ("{}", "the list: Input should be a valid list"),
        ("a: [", "is not YAML"),
        ("- {name: a}", "[0].sha256: Field required"),
        ("- {name: 'a b', sha256: " + HASH + "}", "[0].name: String should match pattern"),
        ("- {name: a, sha256: secret}", "[0].sha256: String should match pattern"),
        (
            "- {name: a, sha256: " + HASH + ", weight: 0}",
            "[0].weight: Input should be greater than or equal to 0.01",
        ),
        ("- {name: a, sha256: " + HASH + ", rate: 1}", "[0].rate: Extra inputs are not permitted"),
        (yaml.safe_dump([entry("x", "a"), entry("x", "b")]), "two entries have the same key"),
        (
            yaml.safe_dump([entry("x", "a"), entry("y", "a", weight=2)]),
            "entries of the same name, 'a', differ in weight",
        ),
    ],
)
def test_a_wrong_list_is_an_error_that_says_where(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        ApiKeys(str(path))
    assert str(refused.value).startswith(f"args.security.api_keys: {path}")
    assert problem in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("where", ["/nowhere/keys.yaml", "env:NO_SUCH_VARIABLE"])
def test_what_is_not_there_is_an_error(where: str) -> None:
    with pytest.raises(ConfigError, match=r"args\.security\.api_keys"):
        ApiKeys(where)

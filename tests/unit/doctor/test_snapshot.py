"""What is asked of kubectl, and what its answers become, with a kubectl that answers from files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from deployments.cli.main import main
from deployments.doctor.snapshot import NoAnswer, read
from tests.unit.doctor.made import healthy

FAKE = """#!/bin/sh
echo "$@" >> {folder}/asked
case "$*" in
  *version*) cat {folder}/version ;;
  *rayservices*|*rayclusters*) echo "error: the server doesn't have a resource type \\"rayservices\\"" >&2; exit 1 ;;
  *kube-node-lease*) echo 'Error from server (Forbidden): leases is forbidden: User "dev" cannot list' >&2; exit 1 ;;
  "get pods -n slowlens "*) cat {folder}/pods ;;
  *) echo '{{"items": []}}' ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "kubectl"
    program.write_text(FAKE.format(folder=tmp_path))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "version").write_text('{"serverVersion": {"gitVersion": "v1.34.4"}}')
    (tmp_path / "pods").write_text(json.dumps({"items": healthy()["pods"]}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_what_is_there_what_is_unknown_and_what_is_refused(kubectl: Path) -> None:
    snapshot = read("slowlens", None)

    assert snapshot.version == "v1.34.4"
    assert [one["metadata"]["name"] for one in snapshot.of("pods")][:2] == ["head", "worker-1"]
    assert snapshot.unknown == {"rayservices", "rayclusters"}
    assert dict(snapshot.refused) == {
        "leases": 'Error from server (Forbidden): leases is forbidden: User "dev" cannot list'
    }


def test_it_only_reads_and_no_secret(kubectl: Path) -> None:
    read("slowlens", "east")
    asked = (kubectl / "asked").read_text().splitlines()

    assert all(line.startswith(("--context east get ", "--context east version ")) for line in asked)
    assert not [line for line in asked if "secret" in line]


def test_the_command(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {one["kind"] for one in found["problems"]} == {"no_operator", "not_looked_at"}


def test_an_api_server_that_is_away(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kubectl / "version").unlink()

    with pytest.raises(NoAnswer):
        read("slowlens", None)
    assert main(["doctor"]) == 1
    assert "the API server cannot be asked" in capsys.readouterr().err


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(SystemExit, match="2"):
        main(["doctor"])
    assert "kubectl is not installed" in capsys.readouterr().err

"""The Secret of Valkey's password is made once, by a script that runs in Valkey's pod, and never read."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "k8s" / "components" / "valkey" / "password.py"


class ApiServer(HTTPServer):
    """Takes Secrets as Kubernetes does: a name that is taken is 409."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.taken: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_POST(self) -> None:
        secret = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        name = secret["metadata"]["name"]
        status = 403 if self.server.refuses else 409 if name in self.server.taken else 201
        if status == 201:
            self.server.taken[name] = secret
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"message": "secrets is forbidden"}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def environment(api: ApiServer, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "namespace").write_text("slowlens")
    (tmp_path / "token").write_text("abc")
    return os.environ | {"SERVICE_ACCOUNT": str(tmp_path), "KUBERNETES_API": f"http://127.0.0.1:{api.server_port}"}


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", SCRIPT], env=environment, capture_output=True, text=True, timeout=30)


def test_it_is_made_once(api: ApiServer, environment: dict[str, str]) -> None:
    first, second = run(environment), run(environment)

    assert (first.returncode, second.returncode) == (0, 0)
    assert api.asked == [("/api/v1/namespaces/slowlens/secrets", "Bearer abc")] * 2
    (secret,) = api.taken.values()
    password = base64.b64decode(secret["data"]["password"]).decode()
    assert secret["metadata"]["name"] == "slowlens-valkey"
    assert secret["immutable"] is True
    assert len(password) == 64
    assert password not in first.stdout + first.stderr + second.stdout


def test_a_refusal_is_told_and_ends_it(api: ApiServer, environment: dict[str, str]) -> None:
    api.refuses = True
    result = run(environment)

    assert result.returncode == 1
    assert result.stderr == 'cannot make the Secret slowlens-valkey: 403 {"message": "secrets is forbidden"}\n'

"""The page application: its configuration and what is built from it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest

from deployments.cli.serve import check
from deployments.errors import ConfigError
from deployments.explain.options import PageConfig
from deployments.page import DiagnosisPage, build
from tests.support.made import moved, otlp, window


@pytest.fixture(autouse=True)
def no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"enable": True},
            "args.enable: unknown key; known here: api_keys, source, metrics, since, max_since, slowest, max_age_s",
        ),
        ({"since": "15"}, "args.since: '15' must be a number followed by s, m, h or d, such as 15m"),
        ({"since": "9" * 60 + "s"}, "is longer than 3660d"),
        ({"slowest": "0%"}, "args.slowest: '0%' must be a percentage above 0% and below 100%, such as 5%"),
        ({"max_age_s": -1.0}, "args.max_age_s"),
    ],
)
def test_an_invalid_key_is_named(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build(args)
    assert message in str(refused.value)

    # `slowlens serve` names it too, before anything starts.
    config = tmp_path / "config.yaml"
    lines = [f"      {key}: {value!r}" for key, value in args.items()]
    config.write_text("\n".join(["applications:", "  - import_path: deployments.page:build", "    args:", *lines]))
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert message in str(refused.value)


def test_a_page_on_an_unused_local_store_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    with pytest.raises(ConfigError, match=r"args\.source: traces do not go to the local store here"):
        build({})
    build({"source": "http://tempo:3200"})


def ask(page: DiagnosisPage, *paths: str) -> list[httpx.Response]:
    """Send requests at once to the page's application."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(page.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return list(await asyncio.gather(*map(client.get, paths)))

    return asyncio.run(send())


@pytest.fixture
def page(tmp_path: Path) -> DiagnosisPage:
    (tmp_path / "traces.jsonl").write_text(otlp(moved(window({"busy": 300.0}), time.time_ns() - 10**18 - 60 * 10**9)))
    return DiagnosisPage(PageConfig(source=str(tmp_path), max_since="2h"))


@pytest.mark.parametrize("since", ["9" * 79 + "s", "3h", "-1s", "1s\x1b"])
def test_a_period_that_is_too_long_is_refused(page: DiagnosisPage, since: str) -> None:
    (refused,) = ask(page, f"/?since={quote(since)}")
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "since"


def test_a_flood_of_different_questions_is_refused_but_for_a_few(page: DiagnosisPage) -> None:
    answers = ask(page, *(f"/?format=json&since={minutes}m" for minutes in range(5, 45)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 16
    assert statuses.count(429) == 24
    assert all(answer.headers["retry-after"] == "5" for answer in answers if answer.status_code == 429)


def test_no_script_but_its_own_may_run(page: DiagnosisPage) -> None:
    (shown,) = ask(page, "/?since=1h")
    policy = shown.headers["content-security-policy"]
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", shown.text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2
    assert re.search(r"script-src ([^;]*);", policy).group(1) == " ".join(f"'sha256-{one}'" for one in hashes)  # type: ignore[union-attr]


def test_its_keys_open_the_page_also_as_a_password(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps([{"name": "ops", "sha256": hashlib.sha256(b"key").hexdigest()}]))
    traces = tmp_path / "traces.jsonl"
    traces.write_text(otlp(moved(window({"busy": 300.0}), time.time_ns() - 10**18 - 60 * 10**9)))
    page = DiagnosisPage(PageConfig(source=str(traces), api_keys=str(tmp_path / "keys.json")))
    (refused,) = ask(page, "/")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Basic realm="slowlens"'

    async def send(**auth: Any) -> int:
        transport = httpx.ASGITransport(page.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return int((await client.get("/", **auth)).status_code)

    assert asyncio.run(send(auth=("whoever", "key"))) == 200
    assert asyncio.run(send(headers={"Authorization": "Bearer key"})) == 200
    with pytest.raises(ConfigError, match=r"args\.api_keys: /nowhere"):
        build({"api_keys": "/nowhere"})

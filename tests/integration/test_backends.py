"""``slowlens trace`` on the HTTP APIs of Jaeger and Tempo, from bodies as their documentation has them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from deployments.command import main

TRACE, BATCH = "0" + "a" * 31, "b" * 32
ROOT, HOP, STAGE, FORWARD, RUN = (digit * 16 for digit in "12345")


class Asked(list[tuple[str, dict[str, list[str]], str]]):
    """``(path, query, Authorization)`` of every request."""

    url: str


@contextmanager
def serving(answers: Mapping[str, Any]) -> Iterator[Asked]:
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked.append((parts.path, parse_qs(parts.query), self.headers.get("Authorization", "")))
            answer = answers.get(parts.path)
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def b64(ident: str) -> str:
    return base64.b64encode(bytes.fromhex(ident)).decode()


def otlp(service: str, *spans: dict[str, Any]) -> dict[str, Any]:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    return {"resource": resource, "scopeSpans": [{"scope": {"name": "slowlens"}, "spans": list(spans)}]}


def tempo_span(trace: str, ident: str, parent: str, name: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    times = {"startTimeUnixNano": str(start * 10**6), "endTimeUnixNano": str(end * 10**6)}
    return {"traceId": b64(trace), "spanId": b64(ident), "parentSpanId": b64(parent), "name": name, **times, **more}


TRANSIT = {"key": "ai.hop.transit_ms", "value": {"doubleValue": 10}}
TEMPO = {
    "/api/echo": b"echo",
    "/api/search": {
        "traces": [
            {"traceID": "c" * 32, "rootTraceName": "ai.inference.predict", "startTimeUnixNano": "5"},
            {"traceID": TRACE[1:], "rootTraceName": "ai.inference.predict", "startTimeUnixNano": "1000000000"},
        ]
    },
    f"/api/traces/{TRACE}": {
        "batches": [
            otlp(
                "slowlens.ingress",
                tempo_span(TRACE, ROOT, "", "ai.inference.predict", 1000, 1040),
                tempo_span(TRACE, HOP, ROOT, "ai.hop.model", 1000, 1040, attributes=[TRANSIT]),
            ),
            otlp(
                "slowlens.model",
                tempo_span(
                    TRACE, STAGE, HOP, "ai.inference.batched_predict", 1010, 1040, status={"code": "STATUS_CODE_ERROR"}
                ),
                tempo_span(
                    TRACE,
                    FORWARD,
                    STAGE,
                    "ai.inference.forward_pass",
                    1010,
                    1040,
                    links=[{"traceId": b64(BATCH), "spanId": b64(RUN)}],
                ),
            ),
        ]
    },
    f"/api/traces/{BATCH}": {
        "batches": [
            otlp("slowlens.model", tempo_span(BATCH, RUN, "", "ai.inference.batch_forward", 1010, 1040)),
        ]
    },
}


def jaeger_span(
    trace: str, ident: str, parent: str, name: str, start: int, end: int, process: str, **tags: Any
) -> dict[str, Any]:
    trace, ident = trace.lstrip("0"), ident.lstrip("0")
    references = [{"refType": "CHILD_OF", "traceID": trace, "spanID": parent}] if parent else []
    if name.endswith("forward_pass"):
        references.append({"refType": "FOLLOWS_FROM", "traceID": BATCH, "spanID": RUN})
    return {
        "traceID": trace,
        "spanID": ident,
        "operationName": name,
        "references": references,
        "startTime": start * 1000,
        "duration": (end - start) * 1000,
        "tags": [{"key": key.replace("__", "."), "type": "any", "value": value} for key, value in tags.items()],
        "logs": [],
        "processID": process,
    }


PROCESSES = {"p1": {"serviceName": "slowlens.ingress", "tags": []}, "p2": {"serviceName": "slowlens.model", "tags": []}}
REQUEST = {
    "traceID": TRACE[1:],
    "spans": [
        jaeger_span(TRACE, ROOT, "", "ai.inference.predict", 1000, 1040, "p1"),
        jaeger_span(TRACE, HOP, ROOT, "ai.hop.model", 1000, 1040, "p1", ai__hop__transit_ms=10),
        jaeger_span(TRACE, STAGE, HOP, "ai.inference.batched_predict", 1010, 1040, "p2", error=True),
        jaeger_span(TRACE, FORWARD, STAGE, "ai.inference.forward_pass", 1010, 1040, "p2"),
    ],
    "processes": PROCESSES,
}
OLDER = {
    "traceID": "c" * 32,
    "spans": [jaeger_span("c" * 32, ROOT, "", "ai.inference.predict", 0, 5, "p1")],
    "processes": PROCESSES,
}
RUN_TRACE = {
    "traceID": BATCH,
    "spans": [jaeger_span(BATCH, RUN, "", "ai.inference.batch_forward", 1010, 1040, "p2")],
    "processes": PROCESSES,
}
JAEGER = {
    "/api/traces": {"data": [OLDER, REQUEST], "errors": None},
    f"/api/traces/{TRACE}": {"data": [REQUEST]},
    f"/api/traces/{BATCH}": {"data": [RUN_TRACE]},
}
DRAWN = [
    f"trace {TRACE}",
    f"predict                  ingress           40.00 ms |{'=' * 40}|",
    f"  hop.model              ingress           40.00 ms |{'=' * 40}| transit_ms 10",
    f"    batched_predict      model             30.00 ms |{' ' * 10}{'x' * 30}|",
    f"      forward_pass       model             30.00 ms |{' ' * 10}{'=' * 30}|",
    f"linked: 0 requests in it, trace {BATCH}",
    f"batch_forward            model             30.00 ms |{' ' * 10}{'=' * 30}|",
    "",
    "40.00 ms were spent on",
    f"  forward                                 30.00 ms |{'#' * 30}{' ' * 10}| 75.0%",
    f"  transit                                 10.00 ms |{'#' * 10}{' ' * 30}| 25.0%",
]


@pytest.mark.parametrize("api", [TEMPO, JAEGER], ids=["tempo", "jaeger"])
@pytest.mark.parametrize("given", [[], [TRACE.upper()]], ids=["newest", "by id"])
def test_a_request_and_its_batch(api: dict[str, Any], given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with serving(api) as asked:
        assert main(["trace", *given, "--source", asked.url + "/"]) == 0
    # Tempo writes a double, Jaeger a number.
    printed = capsys.readouterr().out.replace("transit_ms 10.00", "transit_ms 10")
    assert printed.splitlines() == DRAWN
    searches = [query for path, query, _ in asked if path in ("/api/traces", "/api/search")]
    if given:
        assert searches == []
    elif api is JAEGER:
        assert searches[0]["service"] == ["slowlens.ingress"]
        assert searches[0]["operation"] == ["ai.inference.predict"]
    else:
        assert searches[0]["q"] == ['{ name = "ai.inference.predict" } | select(span.error.type, status)']


@pytest.mark.parametrize(
    ("api", "message"),
    [
        (JAEGER, f"no span of trace {'d' * 32} is here"),
        (TEMPO, f"no span of trace {'d' * 32} is here"),
        ({f"/api/traces/{'d' * 32}": b"<html>"}, "is neither Jaeger's nor Tempo's HTTP API"),
    ],
)
def test_what_cannot_be_shown(api: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(api) as asked:
        assert main(["trace", "d" * 32, "--source", asked.url]) == 1
    assert message in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({}) as asked:
        pass
    assert main(["trace", "--source", asked.url]) == 1
    assert f"{asked.url} cannot be reached" in capsys.readouterr().err


def test_passwords_are_sent_and_never_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({}) as asked:
        assert main(["trace", "--source", asked.url.replace("//", "//me:p%40ss@")]) == 1
        monkeypatch.setenv("SLOWLENS_SOURCE_TOKEN", "t0ken")
        assert main(["trace", "--source", asked.url]) == 1
    assert {header for *_, header in asked} == {f"Basic {base64.b64encode(b'me:p@ss').decode()}", "Bearer t0ken"}
    assert "p%40ss" not in (shown := capsys.readouterr().err)
    assert "p@ss" not in shown

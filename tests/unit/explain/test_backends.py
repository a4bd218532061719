"""``slowlens trace`` and ``why`` on the HTTP APIs of Jaeger and Tempo, with response bodies as documented."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from deployments.cli.main import main
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.servers import http_api
from tests.support.made import moved, otlp_of, window

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
            if callable(answer):
                answer = answer({key: value[0] for key, value in parse_qs(parts.query).items()})
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
    trace, ident = trace.lstrip("0").zfill(1), ident.lstrip("0")
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
    f"linked: batch of 0 requests, trace {BATCH}",
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
        (query,) = searches[0]["q"]
        assert query.startswith('{ name = "ai.inference.predict" } | select(status, ')
        assert "span.error.type" in query


SLOW_TOKEN = {
    "tempo": tempo_span(
        TRACE,
        ROOT,
        "",
        "ai.inference.decode",
        1000,
        2000,
        attributes=[{"key": "ai.decode.usual_gap_ms", "value": {"doubleValue": 70}}],
        events=[
            {
                "name": "slow_token",
                "timeUnixNano": str(1400 * 10**6),
                "attributes": [
                    {"key": "ai.token.index", "value": {"intValue": "41"}},
                    {"key": "ai.token.gap_ms", "value": {"doubleValue": 380.0}},
                ],
            }
        ],
    ),
    "jaeger": jaeger_span(TRACE, ROOT, "", "ai.inference.decode", 1000, 2000, "p2", ai__decode__usual_gap_ms=70)
    | {
        "logs": [
            {
                "timestamp": 1400 * 10**3,
                "fields": [
                    {"key": "event", "type": "string", "value": "slow_token"},
                    {"key": "ai.token.index", "type": "int64", "value": 41},
                    {"key": "ai.token.gap_ms", "type": "float64", "value": 380.0},
                ],
            }
        ]
    },
}


@pytest.mark.parametrize("kind", SLOW_TOKEN)
def test_slow_tokens(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    span = SLOW_TOKEN[kind]
    answers: dict[str, dict[str, Any]] = {
        "tempo": {f"/api/traces/{TRACE}": {"batches": [otlp("slowlens.model", span)]}, "/api/echo": b"echo"},
        "jaeger": {f"/api/traces/{TRACE}": {"data": [{"traceID": TRACE, "spans": [span], "processes": PROCESSES}]}},
    }
    with serving(answers[kind]) as asked:
        assert main(["trace", TRACE, "--source", asked.url]) == 0
    said = "  token 41 waited 380 ms, usually 70: 310 ms more for a step without anybody's prompt"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("api", "message"),
    [
        (JAEGER, f"no spans found for trace {'d' * 32}"),
        (TEMPO, f"no spans found for trace {'d' * 32}"),
        ({f"/api/traces/{'d' * 32}": b"<html>"}, "is neither Jaeger's nor Tempo's HTTP API"),
    ],
)
def test_a_trace_that_cannot_be_shown(api: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(api) as asked:
        assert main(["trace", "d" * 32, "--source", asked.url]) == 1
    assert message in capsys.readouterr().err


def test_a_server_that_knows_no_traces_is_no_empty_store(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/api/v1/query": {}}) as asked:
        for command in ("why", "trace"):
            assert main([command, "--source", asked.url]) == 1
            assert "returned 404 for /api/traces: it is neither a Jaeger" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["zzz", "0x12", "d" * 31, "d" * 33])
def test_what_is_no_trace_id_is_not_asked_for(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trace", given, "--source", "http://127.0.0.1:9"])
    assert f"{given!r} must be a trace id, 32 hexadecimal digits" in capsys.readouterr().err


def test_an_unreachable_backend(capsys: pytest.CaptureFixture[str]) -> None:
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


# --- why, over a whole window ----------------------------------------------------------------------------------------

Query = Mapping[str, str]
FULL = 40


def lately(count: int) -> list[Span]:
    """Requests of the last minute, every twelfth of them slow in the tokenizer."""
    spans = window({"tokenize": 90.0}, count=count)
    last = max(one.end_ns for one in spans if one.service == "slowlens.ingress")
    return moved(spans, time.time_ns() - last - 10**9)


def tempo_of(spans: list[Span], is_old: bool) -> dict[str, Any]:
    traces: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in spans:
        traces[one.trace_id] += otlp_of(one)["resourceSpans"]

    def search(query: Query) -> dict[str, Any]:
        (name,) = re.findall(r'^\{ name = "([a-z_.]+)" \}', query["q"])
        begin_ns, end_ns = int(query["start"]) * 10**9, int(query["end"]) * 10**9
        found = [one for one in spans if one.name == name and begin_ns <= one.start_ns <= end_ns]
        found = found[: int(query["limit"])]
        return {"traces": [summary(one) for one in found], "metrics": {}}

    def summary(root: Span) -> dict[str, Any]:
        made: dict[str, Any] = {"traceID": root.trace_id.lstrip("0").zfill(1), "startTimeUnixNano": str(root.start_ns)}
        span_id = otlp_of(root)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["spanId"]
        duration = {"startTimeUnixNano": str(root.start_ns), "durationNanos": str(root.end_ns - root.start_ns)}
        if not is_old:
            made["spanSets"] = [{"spans": [{"spanID": span_id, **duration, "attributes": []}], "matched": 1}]
        return made

    paths: dict[str, Any] = {f"/api/traces/{ident}": {"batches": parts} for ident, parts in traces.items()}
    return {"/api/echo": b"echo", "/api/search": search, **paths}


def jaeger_of(spans: list[Span]) -> dict[str, Any]:
    traces: dict[str, list[Span]] = defaultdict(list)
    for one in spans:
        traces[one.trace_id].append(one)

    def search(query: Query) -> dict[str, Any]:
        begin_us, end_us, found = int(query["start"]), int(query["end"]), []
        for trace in traces.values():
            asked = (one for one in trace if (one.service, one.name) == (query["service"], query["operation"]))
            if any(begin_us <= one.start_ns // 1000 <= end_us for one in asked):
                found.append(as_jaeger(trace))
        return {"data": found[: int(query["limit"])], "errors": None}

    return {"/api/traces": search}


def as_jaeger(trace: list[Span]) -> dict[str, Any]:
    def known(one: Span) -> dict[str, Any]:
        made = otlp_of(one)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
        tags = {key.replace(".", "__"): value for key, value in one.attributes.items()}
        start, end = one.start_ns // 1000, one.end_ns // 1000
        span = jaeger_span(one.trace_id, made["spanId"], made["parentSpanId"], one.name, 0, 0, one.instance, **tags)
        span |= {"startTime": start, "duration": end - start}
        refs = [
            {"refType": "FOLLOWS_FROM", "traceID": link["traceId"], "spanID": link["spanId"]} for link in made["links"]
        ]
        span["references"] = [ref for ref in span["references"] if ref["refType"] == "CHILD_OF"] + refs
        return span

    processes = {
        one.instance: {
            "serviceName": one.service,
            "tags": [{"key": "service.instance.id", "type": "string", "value": one.instance}],
        }
        for one in trace
    }
    return {"traceID": trace[0].trace_id, "spans": [known(one) for one in trace], "processes": processes}


SERVERS: dict[str, Callable[[list[Span]], dict[str, Any]]] = {
    "tempo": lambda spans: tempo_of(spans, is_old=False),
    "tempo before TraceQL": lambda spans: tempo_of(spans, is_old=True),
    "jaeger": jaeger_of,
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("since", [[], ["--since", "30s"]], ids=["the last hour", "since"])
def test_why_over_more_requests_than_one_response_holds(
    server: str, since: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_api, "_AT_ONCE", FULL)
    with serving(SERVERS[server](lately(240))) as asked:
        assert main(["why", "--source", asked.url, "--format", "json", *since]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)

    # One minute at four requests per second.
    assert found["requests"] == 240 if not since else 100 < found["requests"] < 125
    assert [finding["cause"] for finding in found["findings"]] == ["tokenization"]
    assert found["incomplete"] == 0
    assert found["unaccounted_share"] == 0
    assert sum(stage["share_of_total"] for stage in found["stages"]) == pytest.approx(1, abs=1e-3)
    assert {path for path, *_ in asked} >= {"/api/traces" if server == "jaeger" else "/api/search"}


@pytest.mark.parametrize("server", SERVERS)
def test_why_without_recent_requests(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(SERVERS[server](moved(lately(30), -7200 * 10**9))) as asked:
        assert main(["why", "--source", asked.url]) == 1
    assert f"there is no request in these traces (looked in {asked.url})" in capsys.readouterr().err

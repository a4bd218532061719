"""``slowlens trace``: from files to a waterfall."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.explain.render.waterfall import members
from deployments.telemetry import names
from tests.support.made import request

TRACE, BATCH = "a" * 32, "b" * 32


def span(trace: str, ident: str, parent: str, name: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    times = {"startTimeUnixNano": str(start * 10**6), "endTimeUnixNano": str(end * 10**6)}
    return {"traceId": trace, "spanId": ident, "parentSpanId": parent, "name": name, **times, **more}


def line(service: str, *spans: dict[str, Any]) -> str:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]})


def attribute(key: str, **value: Any) -> dict[str, Any]:
    return {"key": key, "value": value}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    older = span("c" * 32, "9", "", "ai.inference.predict", 0, 50)
    ingress = [
        span(TRACE, "1", "f" * 16, "ai.inference.predict", 1000, 1040),
        span(
            TRACE, "2", "1", "ai.hop.model", 1000, 1040, attributes=[attribute("ai.hop.transit_ms", doubleValue=10.0)]
        ),
    ]
    model = [
        span(TRACE, "3", "2", "ai.inference.batched_predict", 1010, 1030, status={"code": 2}),
        span(TRACE, "4", "3", "ai.inference.forward_pass", 1020, 1030, links=[{"traceId": BATCH, "spanId": "5"}]),
    ]
    batch = span(
        BATCH,
        "5",
        "",
        "ai.inference.batch_forward",
        1020,
        1030,
        attributes=[attribute("ai.batch.actual_size", intValue="2")],
        links=[{"traceId": TRACE, "spanId": "4"}, {"traceId": "c" * 32, "spanId": "8"}],
    )
    (tmp_path / "traces-a.jsonl").write_text(line("slowlens.ingress", *ingress, older) + '\n{"resourceSp')
    (tmp_path / "traces-b.jsonl").write_text(
        line("slowlens.model", *model) + "\n" + line("slowlens.model", batch) + "\n"
    )
    (tmp_path / "metrics-b.jsonl").write_text('{"resourceMetrics": []}\n')
    return tmp_path


def test_the_newest_request_is_drawn_with_its_batch(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--source", str(store)]) == 0
    printed = capsys.readouterr()
    bars = 40

    assert printed.out.splitlines() == [
        f"trace {TRACE}",
        f"predict                  ingress           40.00 ms |{'=' * bars}|",
        f"  hop.model              ingress           40.00 ms |{'=' * bars}| transit_ms 10.00",
        f"    batched_predict      model             20.00 ms |{' ' * 10}{'x' * 20}{' ' * 10}|",
        f"      forward_pass       model             10.00 ms |{' ' * 20}{'=' * 10}{' ' * 10}|",
        f"linked: batch of 2 requests, trace {BATCH}",
        f"batch_forward            model             10.00 ms |{' ' * 20}{'=' * 10}{' ' * 10}| actual_size 2",
        "",
        f"in the batch of trace {BATCH}:",
        f"  {'tokens':>68} {'waited ms':>10}",
        f"  slowlens trace {TRACE} {10.0:>31.2f} (this request)",
        "  and 1 whose trace is not here: not kept, or lost",
        "",
        "40.00 ms were spent on",
        f"  forward                                 10.00 ms |{'#' * 10}{' ' * 30}| 25.0%",
        f"  transit                                 20.00 ms |{'#' * 20}{' ' * 20}| 50.0%",
        f"  unaccounted                             10.00 ms |{'#' * 10}{' ' * 30}| 25.0%",
    ]
    assert printed.err == "1 broken lines or spans were skipped\n"


def test_a_request_by_trace_id_from_a_single_file(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "c" * 32, "--source", str(store / "traces-a.jsonl")]) == 0
    assert capsys.readouterr().out.startswith(f"trace {'c' * 32}\npredict")


def test_a_span_with_a_missing_parent_is_still_shown(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", TRACE, "--source", str(store / "traces-b.jsonl")]) == 0
    assert "\nbatched_predict" in capsys.readouterr().out


def test_spans_that_descend_from_themselves_are_shown_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle = [span(TRACE, ident, parent, f"ai.s{ident}", 1000, 1040) for ident, parent in ("67", "76", "88", "97")]
    (store / "traces-c.jsonl").write_text(line("slowlens.model", *circle))
    assert main(["trace", TRACE, "--source", str(store)]) == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"\ns{ident} ") for ident in "6789"] == [1, 1, 1, 1]


def test_a_span_without_an_id_is_skipped(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "traces-c.jsonl").write_text(line("slowlens.model", span(TRACE, "", "", "ai.nameless", 1000, 1040)))
    assert main(["trace", TRACE, "--source", str(store)]) == 0
    printed = capsys.readouterr()
    assert "nameless" not in printed.out
    assert printed.err == "2 broken lines or spans were skipped\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d" * 32], f"no spans found for trace {'d' * 32}"),
        (["--source", "/nowhere"], "no traces at /nowhere"),
    ],
)
def test_nothing_to_show(store: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    source = [] if "--source" in arguments else ["--source", str(store)]

    assert main(["trace", *arguments, *source]) == 1
    assert message in capsys.readouterr().err


def test_neither_ray_nor_torch_is_imported() -> None:
    code = "import sys, deployments.cli.main; print([m for m in ('ray', 'torch', 'numpy') if m in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_batch_mates_are_listed_with_their_tokens_and_waits() -> None:
    spans, keys = [], []
    for number in range(70):
        made = list(request(number, 0.0, tokens=number, busy=float(number)))
        keys += [one.key for one in made if one.name == names.FORWARD_PASS]
        spans += [
            replace(one, attributes={names.AI_PREPROCESS_TOKEN_COUNT: number}) if one.name == names.PREPROCESS else one
            for one in made
        ]
    batch = replace(next(one for one in spans if one.name == names.BATCH_FORWARD), links=tuple(keys))
    own = keys[3][0]
    _, title, header, first, *rest, last = members(own, [batch], spans)

    assert title == f"in the batch of trace {batch.trace_id}:"
    # Columns end where their heading does; the largest input is first, and 64 requests are listed.
    assert first == f"  slowlens trace {keys[63][0]} {63:>20} {'63.00':>10}"
    assert [header.index("tokens") + 6, len(header)] == [first.index(" 63 ") + 3, len(first)]
    assert len(rest) == 63
    assert sum(line.endswith(" (this request)") for line in rest) == 1
    assert last == "  and 6 more"


def test_a_request_alone_in_its_batch_has_no_batch_mates() -> None:
    spans = list(request(1, 0.0))
    batch = next(one for one in spans if one.name == names.BATCH_FORWARD)

    assert list(members(spans[0].trace_id, [batch], spans)) == []

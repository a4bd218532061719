"""Retroactive sampling on a real cluster: what mattered is kept whole, with those who shared its runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from deployments.engine.fake import fake_token_id
from deployments.telemetry import names
from tests.support.cluster import run_together, wait_for_depth
from tests.support.http import Answer, call, new_traceparent
from tests.support.otlp import OtlpReceiver
from tests.support.traces import WHOLE_TRACE, WHOLE_TREE, named, one, tree

POISON = "poison"


@pytest.fixture(scope="module")
def hold_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int], hold_path: Path) -> int:
    port = deploy(
        model={
            "engine": "fake",
            "fake": {"hold_path": str(hold_path), "poison_token": fake_token_id(POISON)},
        },
        # Only what is slower than nearly everything before counts as slow.
        telemetry={"sampling": {"mode": "retroactive", "slowest_percent": 0.01, "one_in": 1_000_000_000}},
    )
    with ThreadPoolExecutor(8) as pool:
        # Of the first hundred requests of a route all are kept.
        list(pool.map(lambda number: embed(port, f"number {number}"), range(150)))
    return port


def embed(port: int, text: str, **headers: str) -> Answer:
    return call(port, "POST", "/v1/embeddings", {"input": text}, headers)


def test_a_failed_request_is_kept_whole_with_those_who_shared_its_runs(
    port: int, hold_path: Path, receiver: OtlpReceiver
) -> None:
    hold_path.touch()
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(embed, port, "holds the device")
        wait_for_depth(0, running=True)
        texts = ("alice", POISON, "bob")
        answers = run_together([partial(embed, port, text) for text in texts], hold_path.unlink)
        holder.result()
    usual = embed(port, "nothing special")
    traceparent, asked_for, _ = new_traceparent()
    embed(port, "sampled by its caller", traceparent=traceparent)

    assert [answer.status for answer in answers] == [200, 500, 200]
    for answer, weight in zip(answers, (0, 1, 0), strict=True):
        spans = receiver.trace(answer.trace_id, names=WHOLE_TRACE if answer.status == 200 else {names.PREDICT})
        assert one(spans, names.PREDICT).attributes["ai.sampling.weight"] == weight
        if answer.status == 200:
            assert tree(spans, one(spans, names.PREDICT)) == WHOLE_TREE
    # The run in which it failed, and those in which its inputs were tried one by one.
    failed = one(receiver.trace(answers[1].trace_id, names={names.FORWARD_PASS}), names.FORWARD_PASS)
    runs = [
        span for span in named(receiver.spans(), names.BATCH_FORWARD) if (span.trace_id, span.span_id) in failed.links
    ]
    assert len(runs) >= 2
    assert {trace_id for trace_id, _ in runs[0].links} <= {answer.trace_id for answer in answers}

    spans = receiver.trace(asked_for, names=WHOLE_TRACE)
    assert one(spans, names.PREDICT).attributes["ai.sampling.weight"] == 1
    # It was decided before that, and its spans would have come before.
    assert not [span for span in receiver.spans() if span.trace_id == usual.trace_id]
    assert named(receiver.spans(), names.MODEL_LOAD), "what belongs to no request is always kept"

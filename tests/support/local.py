"""Real stages in one process, on the fake engine, called through stand-ins for Serve's handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from deployments.config import AppConfig
from deployments.stages.batch_runner import Entry, RunEntries, SubmitEntries
from deployments.stages.ingress import IngressStage
from deployments.stages.model import ModelStage
from deployments.stages.postprocessor import PostprocessorStage
from deployments.stages.replica import Placement
from deployments.stages.tokenizer import TokenizerStage
from deployments.telemetry.export.provider import ReplicaIdentity

PLACEMENT = Placement(ReplicaIdentity("replica", "node"), "app", 1.0, ())


def run_directly(run: RunEntries, _: int) -> SubmitEntries:
    """Stand in for ``@serve.batch``, which needs to run in a Serve replica."""

    async def submit(entries: Sequence[Entry]) -> None:
        await run(list(entries))

    return submit


class LocalHandle:
    """Stand-in for the ``DeploymentHandle`` that a stage client uses.

    Attributes:
        error: raised by the next calls instead of replying.
        calls: the actor calls so far.
    """

    def __init__(self, name: str, stage: Any) -> None:
        self.deployment_name, self.stage = name, stage
        self._method, self._stream = "", False
        self.error: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []

    def options(self, *, method_name: str, stream: bool, **_: Any) -> LocalHandle:
        self._method, self._stream = method_name, stream
        return self

    def remote(self, calls: tuple[Any, ...]) -> Any:
        self.calls.append(calls)
        return _Stream(self, calls) if self._stream else _Response(self, calls)

    def broadcast(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return _Broadcast(getattr(self.stage, method)(arguments))

    def invoke(self, calls: tuple[Any, ...]) -> Any:
        if self.error is not None:
            raise self.error
        return getattr(self.stage, self._method)(calls)


class _Response:
    def __init__(self, handle: LocalHandle, calls: tuple[Any, ...]) -> None:
        self._task = asyncio.ensure_future(self._run(handle, calls))

    async def _run(self, handle: LocalHandle, calls: tuple[Any, ...]) -> Any:
        return await handle.invoke(calls)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class _Stream:
    def __init__(self, handle: LocalHandle, calls: tuple[Any, ...]) -> None:
        self._handle, self._calls = handle, calls

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for part in self._handle.invoke(self._calls):
            yield part

    def cancel(self) -> None:
        pass


class _Broadcast:
    def __init__(self, work: Any) -> None:
        self._work = work

    async def results_async(self, **_: Any) -> None:
        await self._work


class Application:
    """All four stages, wired as ``app.build`` does."""

    def __init__(self, **args: Any) -> None:
        self.config = AppConfig.parse(args)
        self.tokenizer = LocalHandle("Tokenizer", TokenizerStage(self.config, placement=PLACEMENT))
        self.model_stage = ModelStage(self.config, placement=PLACEMENT, batched=run_directly)
        self.model = LocalHandle("Model", self.model_stage)
        self.postprocessor = LocalHandle("Postprocessor", PostprocessorStage(self.config, placement=PLACEMENT))
        self.handles = (self.tokenizer, self.model, self.postprocessor)
        tokenizer, model, postprocessor = cast(Any, self.handles)
        self.ingress = IngressStage(self.config, tokenizer, model, postprocessor, 7, placement=PLACEMENT)
        self.app = self.ingress.__serve_build_asgi_app__()

    def close(self) -> None:
        """As Serve does when it stops a replica."""
        for stage in (self.ingress, *(handle.stage for handle in self.handles)):
            stage.__del__()

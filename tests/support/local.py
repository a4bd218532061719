"""Real stages in one process, on the fake engine, connected by real channels over the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import httpx2

from deployments.config import AppConfig
from deployments.gateway import GatewayConfig, GatewayStage
from deployments.stages.batch_runner import Entry, RunEntries, SubmitEntries
from deployments.stages.channel_stage import ChannelStage
from deployments.stages.generation.ingress import GenerationIngressStage
from deployments.stages.generation.model import GeneratorStage
from deployments.stages.generation.postprocessor import DetokenizerStage
from deployments.stages.generation.tokenizer import PromptTokenizerStage
from deployments.stages.ingress import IngressStage
from deployments.stages.model import ModelStage
from deployments.stages.postprocessor import PostprocessorStage
from deployments.stages.replica import Placement
from deployments.stages.tokenizer import TokenizerStage
from deployments.telemetry.export.provider import ReplicaIdentity
from deployments.transport.discovery import Address, Addresses, Listener

PLACEMENT = Placement(ReplicaIdentity("replica", "node"), "app", 1.0, ())


def run_directly(run: RunEntries, _: int) -> SubmitEntries:
    """Stand in for ``@serve.batch``, which needs to run in a Serve replica."""

    async def submit(entries: Sequence[Entry]) -> None:
        await run(list(entries))

    return submit


class ListedReplicas:
    """Stand-in for Serve: a directory whose replicas the test lists.

    Attributes:
        wakes: how often a caller without a replica asked for one.
        error: raised by ``wake``.
    """

    def __init__(self, *addresses: Address) -> None:
        self._addresses: Addresses = addresses
        self._listeners: list[Listener] = []
        self.wakes = 0
        self.error: Exception | None = None

    def watch(self, listener: Listener) -> None:
        self._listeners.append(listener)
        listener(self._addresses)

    def list(self, *addresses: Address) -> None:
        """As Serve does when replicas come or go."""
        self._addresses = addresses
        for listener in self._listeners:
            listener(addresses)

    async def wake(self) -> None:
        self.wakes += 1
        if self.error is not None:
            raise self.error


class Application:
    """All four stages, wired as ``app.build`` does. Made and closed on a running loop."""

    ingress_class: type[IngressStage] = IngressStage
    tokenizer: Any
    model: Any
    postprocessor: Any

    def __init__(self, **args: Any) -> None:
        self.config = AppConfig.parse(args)
        self._make_stages()
        self.stages: dict[str, ChannelStage] = {
            "tokenizer": self.tokenizer,
            "model": self.model,
            "postprocessor": self.postprocessor,
        }
        self.directories = {stage: ListedReplicas() for stage in self.stages}
        tokenizer, model, postprocessor = cast(Any, tuple(self.stages))
        self.ingress = self.ingress_class(
            self.config,
            tokenizer,
            model,
            postprocessor,
            7,
            placement=PLACEMENT,
            directory=lambda stage: self.directories[cast(str, stage)],
        )
        self.app = self.ingress.__serve_build_asgi_app__()

    def _make_stages(self) -> None:
        self.tokenizer = TokenizerStage(self.config, placement=PLACEMENT)
        self.model = ModelStage(self.config, placement=PLACEMENT, batched=run_directly)
        self.postprocessor = PostprocessorStage(self.config, placement=PLACEMENT)

    async def start(self) -> None:
        for name, stage in self.stages.items():
            self.directories[name].list(await stage.listen())

    async def close(self) -> None:
        """As Serve does when it stops the replicas."""
        await self.ingress.close()
        for stage in self.stages.values():
            await stage.close()


class GenerationApplication(Application):
    """The same for a language model, on the fake engine unless ``args`` name another."""

    ingress_class = GenerationIngressStage

    def __init__(self, **args: Any) -> None:
        super().__init__(**{"model": {"engine": "fake", "task": "text-generation"}, **args})

    def _make_stages(self) -> None:
        self.tokenizer = PromptTokenizerStage(self.config, placement=PLACEMENT)
        self.model = GeneratorStage(self.config, placement=PLACEMENT)
        self.postprocessor = DetokenizerStage(self.config, placement=PLACEMENT)


class ManyModels:
    """Several applications behind a gateway, as ``gateway.build`` wires them.

    Args:
        applications: their ``args``, by name; each has an engine that is fake.
    """

    def __init__(self, **applications: dict[str, Any]) -> None:
        self.applications: dict[str, Application] = {}
        self.directories: dict[tuple[str, str], ListedReplicas] = {}
        for name, args in applications.items():
            is_generation = args["model"].get("task") == "text-generation"
            self.applications[name] = (GenerationApplication if is_generation else Application)(**args)
        self.gateway = GatewayStage(
            GatewayConfig.parse({"applications": applications}),
            7,
            placement=PLACEMENT,
            handles=lambda stage, application: cast(Any, (application, stage.lower())),
            directory=self._directory,
        )
        self.app = self.gateway.__serve_build_asgi_app__()

    def _directory(self, handle: Any) -> ListedReplicas:
        application, stage = handle
        return self.directories.setdefault((application, stage), ListedReplicas())

    async def start(self) -> None:
        for name, application in self.applications.items():
            for stage, made in application.stages.items():
                address = await made.listen()
                application.directories[stage].list(address)
                self.directories[name, stage].list(address)

    async def close(self) -> None:
        await self.gateway.close()
        for application in self.applications.values():
            await application.close()


Made = TypeVar("Made", Application, GenerationApplication, ManyModels)


def run_with_client(make: Callable[[], Made], use: Callable[[httpx2.AsyncClient, Made], Awaitable[None]]) -> None:
    """Run ``use`` with a client of a fresh application, and close the application."""

    async def run() -> None:
        application = make()
        await application.start()
        transport = httpx2.ASGITransport(application.app)
        try:
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                await use(client, application)
        finally:
            await application.close()

    asyncio.run(run())

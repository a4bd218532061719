"""The application: four deployments bound together. The only module that knows how Serve deploys them.

``serve_config.yaml`` names ``build`` as its import path and passes it ``args``. Serve's scheduling settings are under
``deployments`` in the same file and override the defaults here.
"""

import time
from typing import Any, NamedTuple

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.http.keys import ApiKeys
from deployments.stages.generation.ingress import GenerationIngressStage
from deployments.stages.generation.model import GeneratorStage
from deployments.stages.generation.postprocessor import DetokenizerStage
from deployments.stages.generation.tokenizer import PromptTokenizerStage
from deployments.stages.ingress import IngressStage
from deployments.stages.model import ModelStage
from deployments.stages.postprocessor import PostprocessorStage
from deployments.stages.replica import DEFAULT_MAX_ONGOING_REQUESTS
from deployments.stages.tokenizer import TokenizerStage
from deployments.telemetry.export.provider import destination
from deployments.transport.discovery import ROUTER


class ServedIngress(IngressStage):
    """As Serve runs it: it awaits the destructor of an ingress only if that is a coroutine function."""

    async def __del__(self) -> None:
        await self.close()


class ServedGenerationIngress(GenerationIngressStage):
    """The same for a language model."""

    async def __del__(self) -> None:
        await self.close()


class _Stages(NamedTuple):
    ingress: type[Any]
    tokenizer: type[Any]
    model: type[Any]
    postprocessor: type[Any]


_ENCODER = _Stages(ServedIngress, TokenizerStage, ModelStage, PostprocessorStage)
_GENERATION = _Stages(ServedGenerationIngress, PromptTokenizerStage, GeneratorStage, DetokenizerStage)
_GRACE_S = 5.0
"""How much longer than the longest deadline a replica may take to stop."""


def build(args: dict[str, Any]) -> Application:
    """Build the application from ``args`` of serve_config.yaml.

    Raises ConfigError, naming the key, if they are invalid or the model cannot be found.
    """
    config = AppConfig.parse(args)
    stages = _GENERATION if ModelCard.load(config.model).task == "text-generation" else _ENCODER
    ApiKeys(config.security.api_keys)
    for signal in ("traces", "metrics"):
        destination(signal)
    tokenizer = _behind_the_ingress("Tokenizer", stages.tokenizer, config, num_cpus=0.2)
    model = _behind_the_ingress("Model", stages.model, config, num_cpus=1.0)
    postprocessor = _behind_the_ingress("Postprocessor", stages.postprocessor, config, num_cpus=0.1)
    ingress = deployment("Ingress", serve.ingress()(stages.ingress), config, num_cpus=0.2)
    bound: Application = ingress.bind(config, tokenizer, model, postprocessor, int(time.time()))
    return bound


def _behind_the_ingress(name: str, stage: type[Any], config: AppConfig, *, num_cpus: float) -> Any:
    """A stage that is called through the channel: callers learn of its replicas from the router of their handles."""
    arguments: dict[str, Any] = {"request_router_class": ROUTER}
    router = RequestRouterConfig(**arguments)
    return deployment(name, stage, config, num_cpus=num_cpus, request_router_config=router).bind(config)


def deployment(name: str, stage: type[Any], config: AppConfig, *, num_cpus: float, **options: Any) -> Any:
    """A deployment with the defaults of this application."""
    return serve.deployment(
        name=name,
        max_ongoing_requests=DEFAULT_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": num_cpus},
        health_check_period_s=5,
        # A replica that stops first finishes what it has.
        graceful_shutdown_timeout_s=config.limits.max_timeout_ms / 1e3 + _GRACE_S,
        **options,
    )(stage)

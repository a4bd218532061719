"""The application: four deployments bound together. The only module that knows how Serve deploys them.

``serve_config.yaml`` names ``build`` as its import path and passes it ``args``. Serve's scheduling settings are under
``deployments`` in the same file and override the defaults here.
"""

import time
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.stages.ingress import IngressStage
from deployments.stages.model import ModelStage
from deployments.stages.postprocessor import PostprocessorStage
from deployments.stages.tokenizer import TokenizerStage
from deployments.telemetry.export.provider import destination
from deployments.transport.routing import ROUTER

# More than the gate admits (batching.max_queue), so that requests wait and are rejected in the gate, where this is
# traced, not in front of the ingress. Serve's default of 5 would starve the batches.
_MAX_ONGOING_REQUESTS = 4000


def build(args: dict[str, Any]) -> Application:
    """Build the application from ``args`` of serve_config.yaml.

    Raises ConfigError, naming the key, if they are invalid or the model cannot be found.
    """
    config = AppConfig.parse(args)
    ModelCard.load(config.model)
    for signal in ("traces", "metrics"):
        destination(signal)
    tokenizer = _deployment("Tokenizer", TokenizerStage, num_cpus=0.2).bind(config)
    router: dict[str, Any] = {"request_router_class": ROUTER}
    by_work = RequestRouterConfig(**router)
    model = _deployment("Model", ModelStage, num_cpus=1.0, request_router_config=by_work).bind(config)
    postprocessor = _deployment("Postprocessor", PostprocessorStage, num_cpus=0.1).bind(config)
    ingress = _deployment("Ingress", serve.ingress()(IngressStage), num_cpus=0.2)
    bound: Application = ingress.bind(config, tokenizer, model, postprocessor, int(time.time()))
    return bound


def _deployment(name: str, stage: type[Any], *, num_cpus: float, **options: Any) -> Any:
    return serve.deployment(
        name=name,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": num_cpus},
        health_check_period_s=5,
        **options,
    )(stage)

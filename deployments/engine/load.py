"""Loads the configured engine. Imports torch only if it is needed."""

from __future__ import annotations

from deployments.config import AppConfig
from deployments.engine.card import ModelCard
from deployments.engine.fake import FakeEngine
from deployments.engine.generation.fake import FakeGenerator
from deployments.engine.protocol import BatchEngine, StepEngine


def load_engine(config: AppConfig, card: ModelCard, *, has_gpu: bool, cpus: float) -> BatchEngine:
    if config.model.engine == "fake":
        return FakeEngine(config.model.fake, ranks=card.task == "text-ranking")
    from deployments.engine.encoder import EncoderEngine

    return EncoderEngine(config.model, card, config.batching, has_gpu=has_gpu, cpus=cpus)


def load_generator(config: AppConfig, card: ModelCard, *, has_gpu: bool, cpus: float) -> StepEngine:
    if config.model.engine == "fake":
        return FakeGenerator(config.model.fake, config.generation)
    from deployments.engine.generation.generator import GeneratorEngine

    return GeneratorEngine(config.model, card, config.generation, has_gpu=has_gpu, cpus=cpus)

"""An engine of language models driven step by step, as the device's thread does."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from deployments.batching.generation.steps import Sequence, StepLimits, StepPlanner
from deployments.config import GenerationConfig, ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.generation.generator import GeneratorEngine
from deployments.messages import Sampling

GREEDY = Sampling(temperature=0.0)


def engine(folder: Path, device: str = "cpu", **limits: object) -> GeneratorEngine:
    config = ModelConfig(source=str(folder), dtype="float32", device=device)
    generation = GenerationConfig.parse(dict(limits))
    made = GeneratorEngine(config, ModelCard.load(config), generation, has_gpu=device != "cpu", cpus=1.0)
    made.load(lambda _: contextlib.nullcontext())
    return made


def tokens_of(text: str) -> list[int]:
    """The tokens of ``models.save_language_model`` are bytes, in the order of the alphabet of byte-level BPE."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in pieces for character in piece]


class Steps:
    """Drives an engine by the real planner, as the device's thread does."""

    def __init__(self, made: GeneratorEngine, limits: StepLimits) -> None:
        self.engine, self.planner = made, StepPlanner(limits, made.cache)
        self._numbers = itertools.count(1)
        self.preempted = 0

    def add(self, text: str, tokens: int, sampling: Sampling = GREEDY) -> Sequence:
        sequence = Sequence(next(self._numbers), tokens_of(text), tokens)
        self.engine.start(sequence.number, sampling)
        self.planner.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.planner.plan()
        self.preempted += len(plan.preempted)
        sampled = self.engine.step(plan.members) if plan.members else []
        self.planner.done(plan)
        for member, one in zip(plan.members, sampled, strict=True):
            if one is None:
                continue
            member.sequence.generated.append(one.token)
            ended = one.token in self.engine.end_tokens
            if ended or len(member.sequence.generated) == member.sequence.max_tokens:
                self.remove(member.sequence)

    def remove(self, sequence: Sequence) -> None:
        self.planner.remove(sequence)
        self.engine.forget(sequence.number)

    def run(self) -> None:
        while self.planner.running or self.planner.waiting:
            self.step()

"""Texts of language models over the protocol: a prompt in, a text for each choice out, when they are complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deployments.config import LimitsConfig
from deployments.engine.card import ModelCard
from deployments.engine.outputs.tensors import tensor
from deployments.errors import InvalidField
from deployments.messages import OutputTensor, RenderRequest, Sampling
from deployments.protocols.fields import Framed, Incoming, checked_inputs, checked_text
from deployments.protocols.generation import MAX_CHOICES, ChoiceText, ParsedGeneration
from deployments.protocols.open_inference import rest, rpc
from deployments.protocols.open_inference.tensors import (
    IDS,
    TEXT,
    InferRequest,
    InputTensor,
    by_name,
    check_all_taken,
    check_served,
    needed,
    take,
    take_priority,
    wanted_outputs,
)


def parse_rest(incoming: Incoming, card: ModelCard, limits: LimitsConfig) -> ParsedGeneration:
    """Raises InvalidJson, InvalidField, ModelNotFound or TooLarge."""
    return _parsed(rest.request_of(incoming), card, limits)


def parse_rpc(message: Any, card: ModelCard, limits: LimitsConfig) -> ParsedGeneration:
    """Raises InvalidField, ModelNotFound or TooLarge."""
    return _parsed(rpc.request_of(message, limits), card, limits)


def _parsed(request: InferRequest, card: ModelCard, limits: LimitsConfig) -> ParsedGeneration:
    check_served(request.model, request.version, card)
    prompt = _prompt(by_name(request.inputs, card), card, limits)
    parameters = dict(request.parameters)
    temperature = take(parameters, "temperature", float, 1.0, least=0)
    top_p = take(parameters, "top_p", float, 1.0, least=0)
    if not temperature <= 2:
        raise InvalidField(f"parameters.temperature must be at most 2; got {temperature}", param="parameters")
    if not 0 < top_p <= 1:
        raise InvalidField(f"parameters.top_p must be above 0 and at most 1; got {top_p}", param="parameters")
    top_k = take(parameters, "top_k", int, 0, least=0)
    seed = take(parameters, "seed", int, None)
    choices = take(parameters, "n", int, 1, least=1)
    if choices > MAX_CHOICES:
        raise InvalidField(f"parameters.n must be at most {MAX_CHOICES}; got {choices}", param="parameters")
    stop = parameters.pop("stop", "")
    if not isinstance(stop, str):
        raise InvalidField("parameters.stop must be a string", param="parameters")
    max_tokens = take(parameters, "max_tokens", int, None, least=1)
    timeout_us = take(parameters, "timeout", int, None, least=0)
    priority = take_priority(parameters)
    check_all_taken(parameters, "max_tokens, n, priority, seed, stop, temperature, timeout, top_k, top_p")
    return ParsedGeneration(
        prompt=prompt,
        sampling=Sampling(temperature, top_p, top_k, seed),
        max_tokens=max_tokens,
        max_tokens_param="parameters.max_tokens",
        default_max_tokens=None,
        choices=choices,
        stop=(stop,) if stop else (),
        is_streamed=False,
        wants_usage=False,
        wants_logprobs=False,
        model=card.name,
        timeout_ms=timeout_us / 1e3 if timeout_us else None,
        priority=priority,
        response_id=request.id,
        tensors=wanted_outputs(request, card),
    )


def _prompt(given: Mapping[str, InputTensor], card: ModelCard, limits: LimitsConfig) -> RenderRequest:
    if IDS not in given:
        prompt = needed(given, TEXT)
        if len(prompt.values) != 1:
            raise InvalidField(f"the input {TEXT!r} must have one element; got {len(prompt.values)}", param=TEXT)
        return RenderRequest(TEXT, text=checked_text(prompt.values[0], TEXT, TEXT, "a string", limits))
    if TEXT in given:
        raise InvalidField(f"send the input {TEXT!r} or {IDS!r}, not both", param="inputs")
    if given[IDS].shape[0] != 1:
        raise InvalidField(f"the input {IDS!r} must have one row; got {given[IDS].shape[0]}", param=IDS)
    ids = [int(one) for one in given[IDS].values]
    (checked,) = checked_inputs([ids], IDS, limits, tokens_allowed=True)
    wrong = next((one for one in ids if one >= card.vocab_size), None)
    if wrong is not None:
        raise InvalidField(f"{IDS} must consist of token ids from 0 to {card.vocab_size - 1}; got {wrong}", param=IDS)
    return RenderRequest(IDS, ids=tuple(int(one) for one in checked))


def frame_rest(parsed: ParsedGeneration, card: ModelCard, choices: Sequence[ChoiceText]) -> Framed:
    return rest.framed(card, parsed.response_id, parsed.tensors, _tensors(parsed, choices))


def frame_rpc(parsed: ParsedGeneration, card: ModelCard, choices: Sequence[ChoiceText]) -> Any:
    return rpc.framed(card, parsed.response_id, _tensors(parsed, choices))


def _tensors(parsed: ParsedGeneration, choices: Sequence[ChoiceText]) -> list[OutputTensor]:
    values = {
        "text": [one.text for one in choices],
        "finish_reason": [str(one.finish_reason) for one in choices],
    }
    return [
        tensor(one.name, "BYTES", np.array(values[one.name], dtype=object), is_raw=one.is_raw) for one in parsed.tensors
    ]

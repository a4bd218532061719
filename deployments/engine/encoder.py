"""A transformers model on one device: padded in, one output per input out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from deployments.config import BatchingConfig, ModelConfig
from deployments.engine.card import ModelCard, Pooling
from deployments.engine.protocol import MAX_FILLS, Memory, OutOfMemory, Output, Phase, Run, WarmUp
from deployments.engine.tokenizers import load_pretrained_tokenizer
from deployments.errors import ConfigError
from deployments.messages import Ids

_AUTO_CLASS: dict[str, Any] = {
    "embeddings": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "fill-mask": AutoModelForMaskedLM,
}
_GB = 1e9
_TYPICAL_LENGTH = 16
_SET_UP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _Collated:
    ids: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]
    arrived: torch.cuda.Event | None = None
    """When the copy to the GPU is done."""


class EncoderEngine:
    """See ``engine.base.Engine``.

    Args:
        config: which model, and how to hold it.
        card: what the model is.
        batching: the largest batch, for the warm-up.
        has_gpu: whether the replica was given a GPU (``device: auto`` follows it).
        cpus: CPUs that the replica was given; a run on the CPU uses as many threads, rounded up.
    """

    def __init__(
        self, config: ModelConfig, card: ModelCard, batching: BatchingConfig, *, has_gpu: bool, cpus: float
    ) -> None:
        # NVML and Ray number GPUs so; CUDA would otherwise put the fastest first.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self._config, self._card, self._batching = config, card, batching
        self._device = _device(config.device, has_gpu)
        self.device = str(self._device)
        self._on_gpu = self._device.type == "cuda"
        self._dtype = _dtype(config.dtype, self._device)
        self._pad_id = 0
        self._mask_id: int | None = None
        self.broken: str | None = None
        self._model: Any = None
        if config.quantization == "int8":
            if self._on_gpu:
                raise ConfigError("args.model.quantization: int8 is for CPUs; on a GPU choose a dtype")
            self._dtype = torch.float32
        self.pad_to_multiple_of = config.pad_to_multiple_of or (8 if self._on_gpu else 1)
        self._copies = torch.cuda.Stream(self._device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        if not self._on_gpu:
            torch.set_num_threads(config.threads or max(1, int(np.ceil(cpus))))

    def load(self, phase: Phase) -> WarmUp:
        # A progress bar in a replica's log is noise.
        transformers.utils.logging.disable_progress_bar()
        with phase("weights"):
            self._model = _AUTO_CLASS[self._card.task].from_pretrained(
                self._card.source,
                revision=self._config.revision,
                dtype=self._dtype,
                trust_remote_code=self._config.trust_remote_code,
            )
            tokenizer = load_pretrained_tokenizer(self._config, self._card)
            self._mask_id = tokenizer.mask_token_id
            stated = (tokenizer.pad_token_id, self._model.config.pad_token_id, tokenizer.eos_token_id)
            self._pad_id = next((int(i) for i in stated if i is not None), 0)
            # Classifiers of decoders find the last token of each row by it.
            self._model.config.pad_token_id = self._pad_id
        with phase("device_move"):
            self._model = self._model.to(self._device).eval()
            if self._config.quantization == "int8":
                self._model = _int8(self._model)
            if self._config.compile:
                self._model.compile(dynamic=True)
        with phase("warm_up"):
            return self._warm_up()

    def _warm_up(self) -> WarmUp:
        """The shortest, a typical and the longest input alone, then a full batch of each that the limits allow."""
        longest = self._card.max_length
        timings: dict[int, float] = {}
        too_large: int | None = None
        for length in sorted({min(3, longest), min(_TYPICAL_LENGTH, longest), longest}):
            ids = np.full(length, min(1, self._card.vocab_size - 1), dtype=np.int32)
            if self._mask_id is not None:
                ids[0] = self._mask_id
            full = max(1, min(self._batching.max_batch_size, self._batching.max_batch_tokens // length))
            for size in sorted({1, full}):
                try:
                    if length * size <= _SET_UP_TOKENS:
                        # What the libraries set up for a shape would be much of the time of a small run.
                        self.run(self.collate([ids] * size))
                    started = time.perf_counter()
                    run = self.run(self.collate([ids] * size))
                except OutOfMemory:
                    if size == 1:
                        raise
                    too_large = min(too_large or length * size, length * size)
                else:
                    timings[run.padded_tokens] = (time.perf_counter() - started) * 1e9
        return WarmUp(tuple(timings.items()), too_large)

    def collate(self, batch: Sequence[Ids]) -> _Collated:
        lengths = [len(ids) for ids in batch]
        multiple = self.pad_to_multiple_of
        longest = max(max(lengths), min(-(-max(lengths) // multiple) * multiple, self._card.max_length))
        padded = np.full((len(batch), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        both = torch.from_numpy(np.stack((padded, mask)))
        if self._copies is None:
            return _Collated(both[0], both[1], lengths)
        with torch.cuda.stream(self._copies):
            # From pinned memory and in a stream of its own, so that it overlaps the run before.
            on_device = both.pin_memory().to(self._device, non_blocking=True)
            arrived = self._copies.record_event()
        return _Collated(on_device[0], on_device[1], lengths, arrived)

    def run(self, collated: _Collated) -> Run:
        try:
            return self._run(collated)
        except torch.cuda.OutOfMemoryError as error:
            # What is cached in pieces of the wrong sizes may be all that a smaller run needs.
            torch.cuda.empty_cache()
            raise OutOfMemory(f"{collated.ids.numel()} padded tokens did not fit into the GPU's memory") from error
        except torch.AcceleratorError as error:
            # An illegal access or a device-side assertion: this process can use the device no more.
            self.broken = f"{type(error).__name__} on {self.device}"
            raise

    @torch.inference_mode()
    def _run(self, collated: _Collated) -> Run:
        ids, mask = collated.ids, collated.mask
        timer = _CudaTimer(self._device) if self._on_gpu else _CpuTimer()
        if collated.arrived is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(collated.arrived)
            # Allocated in the stream of the copies: not to be reused before this one is done with it.
            ids.record_stream(stream)
        with timer:
            raw = self._model(input_ids=ids, attention_mask=mask)
            hidden = raw.last_hidden_state if self._card.task == "embeddings" else raw.logits
            result = self._reduce(hidden, ids, mask)
        outputs = self._split(result, collated.lengths)
        # The outputs are on the host by now, so the timer's last event has happened and reading it waits for nothing.
        return Run(
            outputs=outputs,
            inference_ms=timer.elapsed_ms(),
            padded_tokens=ids.numel(),
            output_shape=tuple(hidden.shape),
            peak_memory_gb=torch.cuda.max_memory_allocated(self._device) / _GB if self._on_gpu else None,
        )

    def _reduce(self, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """On the device, make small what would be large to move."""
        if self._card.task == "embeddings":
            pooled = pool(hidden.float(), mask, self._card.pooling)
            return torch.nn.functional.normalize(pooled, dim=-1)
        if self._card.task == "fill-mask":
            at_masks = hidden[self._masks(ids, mask)].float()
            best = at_masks.topk(min(MAX_FILLS, at_masks.shape[-1]), dim=-1)
            probabilities = (best.values - at_masks.logsumexp(dim=-1, keepdim=True)).exp()
            return probabilities, best.indices.to(torch.int32), self._masks(ids, mask).sum(dim=1)
        return hidden.float()

    def _masks(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Where the mask tokens are: some models pad with a token of the same id."""
        return ids.eq(-1 if self._mask_id is None else self._mask_id) & mask.bool()

    def _split(self, result: Any, lengths: list[int]) -> list[Output]:
        """To the host, one output per input, padding cut off."""
        if self._card.task == "fill-mask":
            probabilities, candidates, counts = (part.cpu().numpy() for part in result)
            ends = np.cumsum(counts)
            return [(probabilities[b - n : b], candidates[b - n : b]) for b, n in zip(ends, counts, strict=True)]
        array = result.cpu().numpy()
        if self._card.task == "token-classification":
            return [row[:length] for row, length in zip(array, lengths, strict=True)]
        return list(array)

    def memory(self) -> Memory | None:
        if not self._on_gpu:
            return None
        return Memory(torch.cuda.memory_allocated(self._device) / _GB, torch.cuda.memory_reserved(self._device) / _GB)


def _int8(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of the linear layers in int8, their inputs quantized at each run; the rest stays in float32."""
    with warnings.catch_warnings():
        # It says that a later package replaces it; that one has no build for every platform that this one runs on.
        warnings.simplefilter("ignore")
        quantized: torch.nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            model, {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        )
    return quantized


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """``hidden`` ``[batch, tokens, hidden]`` and ``mask`` ``[batch, tokens]`` to ``[batch, hidden]``.

    The pooling modes of sentence-transformers' Pooling module, padding left out.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(dim=1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class _CpuTimer:
    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._elapsed = time.perf_counter() - self._started

    def elapsed_ms(self) -> float:
        return self._elapsed * 1e3


class _CudaTimer:
    """Times the device's own work, without waiting for it: two events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._events[0].record(self._stream)

    def __exit__(self, *_: object) -> None:
        self._events[1].record(self._stream)

    def elapsed_ms(self) -> float:
        return float(self._events[0].elapsed_time(self._events[1]))


def _device(wanted: str, has_gpu: bool) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if has_gpu and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"args.model.device: {wanted!r} is no device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"args.model.device: {wanted!r}, but this replica sees no CUDA device; give it one with "
            "ray_actor_options.num_gpus, or say auto"
        )
    return device


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False

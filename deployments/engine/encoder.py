"""A transformers model on one device: a padded batch in, one output per input out."""

from __future__ import annotations

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
from deployments.engine.device import TorchEngine
from deployments.engine.protocol import MAX_FILLS, OutOfMemory, Output, Phase, Run, WarmUp
from deployments.engine.tokenizers import load_pretrained_tokenizer
from deployments.errors import ConfigError
from deployments.messages import Ids

_AUTO_CLASS: dict[str, Any] = {
    "embeddings": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
    "text-ranking": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "fill-mask": AutoModelForMaskedLM,
}
_GB = 1e9
_TYPICAL_LENGTH = 16
_SET_UP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _Collated:
    tensors: tuple[torch.Tensor, ...]
    """Token ids, mask and, of pairs of texts, token types; parts of one tensor."""
    lengths: list[int]
    arrived: torch.cuda.Event | None = None
    """Recorded when the copy to the GPU is done."""


class EncoderEngine(TorchEngine):
    """See ``engine.protocol.BatchEngine``.

    Args:
        config: which model to load, and how.
        card: metadata of the model.
        batching: limits of a batch, for the warm-up.
        has_gpu: whether the replica has a GPU (decides ``device: auto``).
        cpus: CPUs assigned to the replica; a run on the CPU uses as many threads, rounded up.
    """

    def __init__(
        self, config: ModelConfig, card: ModelCard, batching: BatchingConfig, *, has_gpu: bool, cpus: float
    ) -> None:
        super().__init__(config, has_gpu=has_gpu, cpus=cpus)
        self._config, self._card, self._batching = config, card, batching
        self._pad_id = 0
        self._mask_id: int | None = None
        self._model: Any = None
        if config.quantization == "int8":
            if self._on_gpu:
                raise ConfigError("args.model.quantization: int8 is for CPUs; on a GPU choose a dtype")
            self._dtype = torch.float32
        self.pad_to_multiple_of = config.pad_to_multiple_of or (8 if self._on_gpu else 1)
        self._copies = torch.cuda.Stream(self._device) if self._on_gpu else None  # type: ignore[no-untyped-call]

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
            # Decoder-based classifiers use it to find the last token of each row.
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
        """Run the shortest, a typical and the longest input, each alone and in the largest batch allowed."""
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
                        # Untimed: the libraries' setup for a shape would be a large part of the time of a small run.
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
        types = np.zeros_like(mask) if any(ids.ndim == 2 for ids in batch) else None
        for row, ids in enumerate(batch):
            padded[row, : len(ids)] = ids if ids.ndim == 1 else ids[:, 0]
            mask[row, : len(ids)] = 1
            if types is not None and ids.ndim == 2:
                types[row, : len(ids)] = ids[:, 1]
        stacked = torch.from_numpy(np.stack((padded, mask) if types is None else (padded, mask, types)))
        if self._copies is None:
            return _Collated(tuple(stacked), lengths)
        with torch.cuda.stream(self._copies):
            # From pinned memory and in a separate stream, so that the copy overlaps the previous run.
            on_device = stacked.pin_memory().to(self._device, non_blocking=True)
            arrived = self._copies.record_event()
        return _Collated(tuple(on_device), lengths, arrived)

    def run(self, collated: _Collated) -> Run:
        with self._on_device(f"{collated.tensors[0].numel()} padded tokens"):
            return self._run(collated)

    @torch.inference_mode()
    def _run(self, collated: _Collated) -> Run:
        ids, mask, *types = collated.tensors
        timer = _CudaTimer(self._device) if self._on_gpu else _CpuTimer()
        if collated.arrived is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(collated.arrived)
            # Allocated in the copy stream: must not be reused before this stream is done with it.
            ids.record_stream(stream)
        with timer:
            more = {"token_type_ids": types[0]} if types else {}
            raw = self._model(input_ids=ids, attention_mask=mask, **more)
            hidden = raw.last_hidden_state if self._card.task == "embeddings" else raw.logits
            result = self._reduce(hidden, ids, mask)
        outputs = self._split(result, collated.lengths)
        # The outputs are on the host by now, so the timer's last event has completed and reading it does not block.
        return Run(
            outputs=outputs,
            inference_ms=timer.elapsed_ms(),
            padded_tokens=ids.numel(),
            output_shape=tuple(hidden.shape),
            peak_memory_gb=torch.cuda.max_memory_allocated(self._device) / _GB if self._on_gpu else None,
        )

    def _reduce(self, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Reduce the output on the device, so that less is copied to the host."""
        if self._card.task == "embeddings":
            return pool(hidden.float(), mask, self._card.pooling)
        if self._card.task == "fill-mask":
            at_masks = hidden[self._masks(ids, mask)].float()
            best = at_masks.topk(min(MAX_FILLS, at_masks.shape[-1]), dim=-1)
            probabilities = (best.values - at_masks.logsumexp(dim=-1, keepdim=True)).exp()
            return probabilities, best.indices.to(torch.int32), self._masks(ids, mask).sum(dim=1)
        return hidden.float()

    def _masks(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Positions of the mask tokens, without padding: some models pad with the same token id."""
        return ids.eq(-1 if self._mask_id is None else self._mask_id) & mask.bool()

    def _split(self, result: Any, lengths: list[int]) -> list[Output]:
        """Copy the result to the host and split it into one output per input, without padding."""
        if self._card.task == "fill-mask":
            probabilities, candidates, counts = (part.cpu().numpy() for part in result)
            ends = np.cumsum(counts)
            return [(probabilities[b - n : b], candidates[b - n : b]) for b, n in zip(ends, counts, strict=True)]
        array = result.cpu().numpy()
        if self._card.task == "token-classification":
            return [row[:length] for row, length in zip(array, lengths, strict=True)]
        return list(array)


def _int8(model: torch.nn.Module) -> torch.nn.Module:
    """Quantize the weights of the linear layers to int8, and their inputs at each run; the rest stays in float32."""
    with warnings.catch_warnings():
        # Deprecation warning: the replacement package has no builds for some platforms that this one runs on.
        warnings.simplefilter("ignore")
        quantized: torch.nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            model, {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        )
    return quantized


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool ``hidden`` ``[batch, tokens, hidden]`` with ``mask`` ``[batch, tokens]`` to ``[batch, hidden]``.

    The modes are those of sentence-transformers' Pooling module; padding is excluded.
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
    """Times the device's work without waiting for it, with two events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._events[0].record(self._stream)

    def __exit__(self, *_: object) -> None:
        self._events[1].record(self._stream)

    def elapsed_ms(self) -> float:
        return float(self._events[0].elapsed_time(self._events[1]))

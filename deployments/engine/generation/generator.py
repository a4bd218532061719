"""A causal language model of transformers: steps over its paged cache, as its continuous batching runs them.

The cache, the inputs of a step and the run of the model are transformers' own. What a step contains, and which token
follows, is decided here: their manager samples for all requests alike, copies all tokens for each new one, and fails
every request when the cache is full.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from deployments.batching.generation.steps import Member
from deployments.batching.generation.steps import Sequence as Generation
from deployments.config import GenerationConfig as Limits
from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.device import TorchEngine
from deployments.engine.generation import attention
from deployments.engine.generation.sampling import Sampler, sample
from deployments.engine.protocol import Phase, Sampled, WarmUp
from deployments.errors import ConfigError
from deployments.messages import Sampling

_CPU_CACHE_TOKENS = 16_384
_CPU_PAGE, _GPU_PAGE = 32, 256
"""Flash attention reads pages of 256; on a CPU smaller ones share more of a prompt."""
_GB = 1e9


class _LogitsRunner(ModelRunner):  # type: ignore[misc]
    """Runs the model and keeps the logits, for the sequences to choose from, each by its own settings."""

    logits: torch.Tensor

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:  # noqa: ARG002
        rows = scores[0]
        if not self.pad_inputs:
            self.logits = rows
            return
        # Captured in a CUDA graph: only memory that outlives it can be read after a replay.
        if not hasattr(self, "logits"):
            shape = (self.cb_config.max_requests_per_batch, rows.shape[-1])
            self.logits = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        self.logits[: rows.shape[0]].copy_(rows)


class PagedCache:
    """See ``batching.generation.steps.Cache``: transformers' paged cache, by sequence."""

    def __init__(self, cache: Any, page: int) -> None:
        self._cache, self.page = cache, page
        self.capacity: int = cache.num_blocks * page
        self.states: dict[int, RequestState] = {}

    def match(self, sequence: Generation) -> int:
        state = RequestState(str(sequence.number), sequence.prompt + sequence.generated)
        state.status = RequestStatus.PREFILLING
        self.states[sequence.number] = state
        matched: int = self._cache.search_prefix_match(state.request_id, state.initial_tokens)
        state.position_offset = matched
        return matched

    def hold(self, sequence: Generation, tokens: int) -> bool:
        state = self.states[sequence.number]
        self._cache.pool.try_to_free_sectors()
        if self._cache.can_store_request_tokens(state, tokens):
            return True
        # What is kept for prompts to come is given up for those that are here.
        if not self._cache.evict_cached_blocks():
            return False
        self._cache.pool.try_to_free_sectors()
        return bool(self._cache.can_store_request_tokens(state, tokens))

    def release(self, sequence: Generation) -> None:
        if self.states.pop(sequence.number, None) is not None:
            self._cache.free_blocks(str(sequence.number))


class GeneratorEngine(TorchEngine):
    """See ``engine.protocol.StepEngine``.

    Args:
        config: which model to load, and how.
        card: metadata of the model.
        limits: sizes of the cache and of a step.
        has_gpu: whether the replica has a GPU (decides ``device: auto``).
        cpus: CPUs assigned to the replica; a step on the CPU uses as many threads, rounded up.
    """

    cache: PagedCache

    def __init__(self, config: ModelConfig, card: ModelCard, limits: Limits, *, has_gpu: bool, cpus: float) -> None:
        if config.quantization != "none" or config.compile:
            key = "compile" if config.compile else "quantization"
            raise ConfigError(f"args.model.{key}: not for language models")
        super().__init__(config, has_gpu=has_gpu, cpus=cpus)
        self._config, self._card, self._limits = config, card, limits
        self.end_tokens = frozenset(card.end_tokens)
        self._model: Any = None
        self._inputs: Any = None
        self._runner: Any = None
        self._paged: Any = None
        self._logits_processor: Any = None
        self._samplers: dict[int, Sampler] = {}

    def load(self, phase: Phase) -> WarmUp:
        transformers.utils.logging.disable_progress_bar()
        with phase("weights"):
            self._model = AutoModelForCausalLM.from_pretrained(
                self._card.source,
                revision=self._config.revision,
                dtype=self._dtype,
                trust_remote_code=self._config.trust_remote_code,
            )
        with phase("device_move"):
            self._model = self._model.to(self._device).eval()
            self._make_cache()
        with phase("warm_up"):
            return self._warm_up()

    def _make_cache(self) -> None:
        page = _GPU_PAGE if self._on_gpu else _CPU_PAGE
        tokens = self._limits.kv_cache_tokens or (None if self._on_gpu else _CPU_CACHE_TOKENS)
        settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=None if tokens is None else max(1, tokens // page),
            max_batch_tokens=self._limits.max_batch_tokens,
            max_memory_percent=self._limits.kv_memory_fraction,
            max_requests_per_batch=self._limits.max_sequences,
            use_async_batching=False,
        )
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1), continuous_batching_config=settings
        )
        # The manager's own loop is not started; its parts are built by what it found out about model and device.
        processor = manager._create_batch_processor()  # noqa: SLF001
        self._inputs, self._paged = processor.inputs_and_outputs, processor.cache
        self._logits_processor = processor.logit_processor
        self._runner = _LogitsRunner(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            cache=processor.cache,
            inputs_and_outputs=processor.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        self.cache = PagedCache(self._paged, page)
        is_plain = self._model.config._attn_implementation == "sdpa"  # noqa: SLF001 (has no other name)
        if not self._on_gpu and is_plain and list(self._paged.cache_allocators) == ["full_attention"]:
            attention.register()
            self._model.set_attn_implementation(attention.NAME)

    @torch.inference_mode()
    def _warm_up(self) -> WarmUp:
        """Run a prompt and its next token twice: to set everything up, and to time them."""
        self._runner.warmup(self._model)
        runs: tuple[tuple[int, float], ...] = ()
        for number in (-1, -2):
            # Different tokens, so that the second prompt is not found in the cache.
            token = number % self._card.vocab_size
            sequence = Generation(number, [token] * self._warm_up_length(), 2)
            self.start(number, Sampling(temperature=0.0))
            self.cache.match(sequence)
            runs = tuple(self._timed(sequence, tokens) for tokens in (len(sequence.prompt), 1))
            self.cache.release(sequence)
            self.forget(number)
        gc.collect()
        return WarmUp(runs)

    def _timed(self, sequence: Generation, tokens: int) -> tuple[int, float]:
        self.cache.hold(sequence, tokens)
        began = time.perf_counter()
        (sampled,) = self.step([Member(sequence, tokens, not sequence.generated, True)])
        took_ns = (time.perf_counter() - began) * 1e9
        assert sampled is not None
        sequence.computed += tokens
        sequence.generated.append(sampled.token)
        return tokens, took_ns

    def _warm_up_length(self) -> int:
        return max(1, min(64, self._card.max_length - 2, self._limits.max_batch_tokens, self.cache.capacity - 2))

    def start(self, number: int, sampling: Sampling) -> None:
        self._samplers[number] = Sampler(sampling)

    def forget(self, number: int) -> None:
        self._samplers.pop(number, None)

    def step(self, members: Sequence[Member]) -> list[Sampled | None]:
        with self._on_device(f"a step of {len(members)} sequences"):
            return self._step(members)

    @torch.inference_mode()
    def _step(self, members: Sequence[Member]) -> list[Sampled | None]:
        batch = [self._future(member) for member in members]
        read = sum(future.state.position_offset for future in batch)
        is_decode = all(member.tokens == 1 for member in members) and all(
            future.state.position_offset < self._paged.max_decode_fast_path_length for future in batch
        )
        tokens, read = self._runner.maybe_pad_inputs(sum(member.tokens for member in members), read, is_decode)
        self._inputs.prepare_batch_tensors(
            requests_in_batch=batch,
            logits_processors=self._logits_processor,
            use_decode_fast_path=is_decode,
            num_q_tokens=tokens,
            max_kv_read=read,
            use_padding=self._runner.pad_inputs,
        )
        arguments = self._inputs.get_model_kwargs(use_padding=self._runner.pad_inputs)
        self._runner.compute_batch(self._model, arguments)
        # Waits for the device.
        self._inputs.retrieve_device_outputs()
        for future in batch:
            self._paged.mark_complete_blocks(future.state, future.complete_blocks)
        sampling = [member for member in members if member.samples]
        if not sampling:
            return [None] * len(members)
        logits = self._runner.logits[: len(sampling)].float().cpu()
        chosen = iter(sample(logits, [self._samplers[member.sequence.number] for member in sampling]))
        return [next(chosen) if member.samples else None for member in members]

    def _future(self, member: Member) -> FutureRequestState:
        sequence = member.sequence
        state = self.cache.states[sequence.number]
        state.tokens_to_process = sequence.next_tokens(member.tokens)
        state.status = RequestStatus.PREFILLING if member.is_prefill else RequestStatus.DECODING
        complete = self._paged.count_new_complete_blocks(state, member.tokens)
        if complete:
            # By its tokens, a block is found again that others can share.
            state.generated_tokens = (sequence.prompt + sequence.generated)[len(state.initial_tokens) :]
        return FutureRequestState(state, member.samples, complete, member.tokens)

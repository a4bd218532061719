"""What the stages require of a tokenizer and of an engine.

Every engine loads, warms up and reports the state of its device (``Engine``). How it computes is a separate protocol: a
``BatchEngine`` runs a batch from start to finish, as encoders do, and is driven by ``stages.batch_runner``. An engine
that advances many sequences one step at a time, as language models do, is a ``StepEngine``, driven by
``stages.generation.step_runner``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.batching.generation.steps import Cache, Member
from deployments.messages import ChatMessage, Ids, Sampling, TokenLogprobs

Output = Any
"""One input's result, by task, as float32 arrays on the host:

- embeddings: ``[hidden]``, pooled;
- text-classification, text-ranking: logits ``[labels]``;
- token-classification: logits ``[tokens, labels]``;
- fill-mask: ``(probabilities [masks, MAX_FILLS], token ids [masks, MAX_FILLS])``, best first.
"""

MAX_FILLS = 100
"""Candidates kept for each mask, and therefore the maximum ``top_k`` of fill-mask."""

MAX_MASKS = 16
"""Maximum masks in one fill-mask input: each costs a vocabulary-sized row in the model and many decodings after it."""

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized input."""

    ids: Ids
    """``[tokens]``, or ``[tokens, 2]`` with the token types, see ``messages.Tokenized``."""
    full_length: int
    """Tokens before truncation; more than ``len(ids)`` only if tokens were truncated."""
    offsets: list[tuple[int, int]] | None = None
    """Start and end character of each token; ``(-1, -1)`` for special tokens."""
    tokens: tuple[str, ...] = ()
    """As the vocabulary has them; only from ``Tokenizer.describe``."""


Text = str | tuple[str, str]
"""A text, or a pair of texts that a cross-encoder compares."""


class Tokenizer(Protocol):
    """Thread-safe."""

    mask_token: str | None
    mask_token_id: int | None
    special_ids: frozenset[int]

    def encode(self, texts: Sequence[Text], *, with_offsets: bool) -> list[Encoded]:
        """Tokenize, truncating to the model's ``max_length``. Holds the GIL only to build the result."""
        ...

    def describe(self, texts: Sequence[str], *, adds_special_tokens: bool) -> list[Encoded]:
        """Tokenize without truncating, with tokens and offsets."""
        ...


class TextTokenizer(Protocol):
    """The tokenizer of a language model. Thread-safe."""

    def encode(self, text: str) -> Ids:
        """Tokenize a prompt, with the special tokens that begin one."""
        ...

    def render(self, messages: Sequence[ChatMessage]) -> Ids:
        """Tokenize a conversation by the model's chat template, up to where the answer begins.

        Raises ``tokenizers.TemplateError``.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones left out; U+FFFD where the bytes of a character are incomplete."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one run of the model."""

    outputs: list[Output]
    inference_ms: float
    """Time of the model itself: by CUDA events on a GPU, by the clock on a CPU. Excludes collation and copies."""
    padded_tokens: int
    output_shape: tuple[int, ...]
    peak_memory_gb: float | None = None


class OutOfMemory(Exception):
    """A run did not fit in the device's memory. A smaller one may fit."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Results of the warm-up."""

    runs: tuple[tuple[int, float], ...] = ()
    """Padded tokens and nanoseconds of each run, collation included."""
    too_large: int | None = None
    """Padded tokens of the smallest run that did not fit in memory."""


@dataclass(frozen=True, slots=True)
class Memory:
    allocated_gb: float
    reserved_gb: float


class Engine(Protocol):
    """Interface common to all engines."""

    device: str
    broken: str | None
    """Why no further run can succeed in this process; the replica must then be replaced."""

    def load(self, phase: Phase) -> WarmUp:
        """Load weights, move them to the device and warm up, each inside ``with phase(name)``. Blocks."""
        ...

    def memory(self) -> Memory | None:
        """GPU memory that this process holds, or None on a CPU."""
        ...


class BatchEngine(Engine, Protocol):
    """An engine that runs a batch from start to finish."""

    pad_to_multiple_of: int
    """Inputs are padded to the longest, rounded up to a multiple of this."""

    def collate(self, batch: Sequence[Ids]) -> Any:
        """Pad ``batch`` (each ``[tokens]``) and send it to the device. May overlap a run, in another thread."""
        ...

    def run(self, collated: Any) -> Run:
        """Run the model once on the output of ``collate``. Called from one thread.

        May raise any exception, including OutOfMemory; the caller isolates the input that caused it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a sequence."""

    token: int
    logprobs: TokenLogprobs | None = None


class StepEngine(Engine, Protocol):
    """An engine that advances sequences one step at a time, with their keys and values in its cache."""

    @property
    def cache(self) -> Cache:
        """There once it is loaded."""
        ...

    end_tokens: frozenset[int]
    """Tokens that end a text."""

    def step(self, members: Sequence[Member]) -> list[Sampled | None]:
        """Compute the next tokens of each member, and choose the token that follows, where the member asks for it.

        The cache holds room for them. Called from one thread.
        """
        ...

    def start(self, number: int, sampling: Sampling) -> None:
        """Prepare to choose the tokens of a new sequence."""
        ...

    def forget(self, number: int) -> None:
        """Drop what ``start`` prepared."""
        ...

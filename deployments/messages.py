"""Messages between processes, as msgspec structs: frozen, compact and free of behaviour.

1. A ``Call`` is a request to a stage with its trace context (the caller's hop span, as W3C text) and its id for logs.
   How long it may take and how long it has waited is written when it leaves (``transport.frames``), and reaches the
   stage in its ``Envelope``.
2. Every ``Reply`` reports how long the stage held the request, by the stage's monotonic clock. The caller's duration
   minus this one is the cost of the hop; clocks of different machines are never subtracted from each other.
3. ``work`` compares the requests of one stage: how long it is busy with each, in a unit of its own. Callers choose the
   replica with the least.
4. Sequences of token ids are sent as one flat array and their lengths, not as lists of numbers.
5. On the wire a struct is the array of its fields. A field may be added at the end, with a default; anything else is
   another version of the protocol (``transport.handshake``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from deployments.errors import Failure

Ids = npt.NDArray[np.int32]
Request = TypeVar("Request")
Result = TypeVar("Result")
Task = Literal[
    "embeddings", "text-classification", "token-classification", "fill-mask", "text-ranking", "text-generation"
]


class _Message(msgspec.Struct, frozen=True, array_like=True):
    pass


class Carrier(_Message, frozen=True):
    """W3C trace context of the span that the receiver's spans are children of."""

    traceparent: str
    tracestate: str = ""


class Call(_Message, Generic[Request], frozen=True):
    """One request to a stage, as it is sent."""

    carrier: Carrier
    request_id: str
    request: Request


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a stage knows of a call besides its request. Times are monotonic nanoseconds of the stage's process."""

    carrier: Carrier
    request_id: str
    arrived_ns: int
    deadline_ns: int
    """The time that was left when the call was sent, counted from its arrival."""
    waited_ns: int = 0
    """How long the call had waited at its caller for a replica that could take it."""


class Ragged(_Message, frozen=True):
    """``n`` sequences in one array: ``values`` of shape ``[sum(lengths), ...]``."""

    values: npt.NDArray[Any]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: list[Any], dtype: npt.DTypeLike = np.int32) -> Ragged:
        flat = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.empty(0, dtype)
        return cls(flat, tuple(len(row) for row in rows))

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        start = 0
        for length in self.lengths:
            yield self.values[start : start + length]
            start += length


class Reply(_Message, Generic[Result], frozen=True):
    """What a stage sends back for one request: a result or a failure, and how long the stage held the request."""

    held_ns: int
    result: Result | None = None
    failure: Failure | None = None


class Share(_Message, frozen=True):
    """On whose behalf a request is made, and how it shares the device with others."""

    tenant: str = ""
    """Name of the API key; empty if there are none."""
    weight: float = 1.0
    """Tenants get tokens in proportion to it."""
    priority: int = 0
    """0: interactive; 1: of a batch job."""


NOBODYS = Share()


# --- tokenizer -------------------------------------------------------------------------------------------------------


class TokenizeRequest(_Message, frozen=True):
    inputs: tuple[str | tuple[int, ...], ...]
    """Texts, or token ids supplied by the caller (used as they are, without adding special tokens)."""
    truncate: bool
    param: str
    """The request field that the inputs came from, for error messages."""
    tenant: str = ""
    query: str | None = None
    """Each input is encoded as a pair with it, for text-ranking."""
    describes: bool = False
    """Whether the tokens themselves are wanted (``Tokenized.tokens``, ``offsets``): then nothing is truncated."""
    adds_special_tokens: bool = True
    """False only with ``describes``."""
    types: tuple[tuple[int, ...], ...] = ()
    """Of token ids, their token types, for a cross-encoder: one for each id of each input."""

    @property
    def work(self) -> int:
        """In characters or token ids, with 50 for the request."""
        return 50 + sum(map(len, self.inputs)) + len(self.query or "") * len(self.inputs)


class Tokenized(_Message, frozen=True):
    ids: Ragged
    """Of each input, ``[tokens]``; of a pair of texts for a model that tells them apart, ``[tokens, 2]``: each token's
    id, and 0 or 1 for the text that it belongs to (``token_type_ids``)."""
    truncated: tuple[bool, ...]
    offsets: Ragged | None = None
    """Start and end of each token, ``[tokens, 2]``; ``(-1, -1)`` for special tokens, ``(-2, -2)`` for others whose text
    is not known. Only for token-classification."""
    tokens: tuple[tuple[str, ...], ...] = ()
    """Of each input, its tokens as the vocabulary has them, if they were asked for."""


class ChatMessage(_Message, frozen=True):
    role: str
    content: str
    name: str = ""


class RenderRequest(_Message, frozen=True):
    """A prompt of a language model: a conversation, for its chat template, or a text, or token ids."""

    param: str
    messages: tuple[ChatMessage, ...] = ()
    text: str | None = None
    ids: tuple[int, ...] = ()

    @property
    def work(self) -> int:
        """In characters or token ids, with 50 for the request."""
        return 50 + sum(len(m.content) for m in self.messages) + len(self.text or "") + len(self.ids)


# --- model -----------------------------------------------------------------------------------------------------------


class PredictRequest(_Message, frozen=True):
    ids: Ragged
    param: str
    share: Share = NOBODYS

    @property
    def work(self) -> int:
        """In tokens, with 16 for each input."""
        return sum(self.ids.lengths) + 16 * len(self.ids.lengths)


class Predicted(_Message, frozen=True):
    outputs: tuple[Any, ...]
    """One per input, see ``engine.protocol.Output``."""
    forward_ns: int
    """Length of the union of the runs that the request was in. It spent the rest of ``Reply.held_ns`` in the queue."""
    device: str


class Sampling(_Message, frozen=True):
    """How the next token is chosen from the model's distribution, see ``engine.generation.sampling``."""

    temperature: float = 1.0
    """0: the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    seed: int | None = None
    logprobs: int | None = None
    """How many of the most probable tokens to report for each, besides the chosen one; None: no log probabilities."""


class GenerateRequest(_Message, frozen=True):
    ids: Ids
    """The prompt, ``[tokens]``."""
    max_tokens: int
    sampling: Sampling
    choices: int
    is_streamed: bool
    """Whether tokens are sent as they come, or all at the end."""
    param: str
    share: Share = NOBODYS

    @property
    def work(self) -> int:
        """In tokens; an output token takes about as long as ten of the prompt."""
        return len(self.ids) + 10 * self.max_tokens * self.choices


class TokenLogprobs(_Message, frozen=True):
    """Log probabilities at one position: of the chosen token, and of the most probable ones, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


FinishReason = Literal["stop", "length"]


class TokenDelta(_Message, frozen=True):
    """New tokens of one choice."""

    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


class TokenDeltas(_Message, frozen=True):
    """A chunk of a generation: what is new since the last one."""

    deltas: tuple[TokenDelta, ...]
    queue_ns: int = 0
    """How long the first choice waited for its first step."""
    prefill_ns: int = 0
    """From there until its first token."""
    decode_ns: int = 0
    """From there until the newest token of any choice."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""


class Generated(_Message, frozen=True):
    """The end of a generation, whose tokens have been sent."""

    device: str


# --- postprocessor ---------------------------------------------------------------------------------------------------


class TensorOption(_Message, frozen=True):
    """One output tensor that is wanted."""

    name: str
    is_raw: bool
    """As bytes (little-endian, row by row), not as JSON text."""


class OutputOptions(_Message, frozen=True):
    """Output options of a request. ``route`` decides the shape; the others apply to the tasks that support them."""

    route: Literal["/v1/embeddings", "/predict", "/embed", "/similarity", "/rerank", "/v1/rerank", "/v2"]
    top_k: int | None = None
    dimensions: int | None = None
    base64: bool = False
    normalize: bool = True
    raw_scores: bool = False
    """Logits of the model instead of scores between 0 and 1."""
    wants_texts: bool = False
    """Whether the texts are part of the response."""
    tensors: tuple[TensorOption, ...] = ()
    """Output tensors to return, for ``/v2``."""


class PostprocessRequest(_Message, frozen=True):
    tokenized: Tokenized
    outputs: tuple[Any, ...]
    options: OutputOptions
    texts: tuple[str, ...] = ()
    """Only for token-classification, and if ``options.wants_texts``."""

    @property
    def work(self) -> int:
        """In microseconds, roughly."""
        # A fill-mask candidate is decoded to text; a number is only formatted.
        return sum(50 + (output.size // 5 if isinstance(output, np.ndarray) else 5_000) for output in self.outputs)


class OutputTensor(_Message, frozen=True):
    """One output tensor of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    """Its bytes, or its values as JSON text, separated by commas."""


class Postprocessed(_Message, frozen=True):
    fragments: tuple[bytes, ...]
    """Parts of the response's JSON: one per input, or, of a ranking, one per result, best first. Numbers are formatted
    as text in this stage, which scales, not in the ingress."""
    tensors: tuple[OutputTensor, ...] = ()
    """Instead of fragments, for ``/v2``."""


class TokenText(_Message, frozen=True):
    """A token as text, with its log probability and those of the most probable ones."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class HeldToken(_Message, frozen=True):
    """A token whose text has not been passed on to its end."""

    token: TokenText
    chars: int
    """How much of its text has not."""


class TextState(_Message, frozen=True):
    """What a text that is generated needs to be continued: held by the caller between calls, opaque to it."""

    context: tuple[int, ...] = ()
    """The last tokens whose text is known: the text of those that follow depends on them."""
    pending: tuple[int, ...] = ()
    """Tokens after those, which end within a character."""
    held: str = ""
    """Text that may be the beginning of a stop string, and is not passed on yet."""
    held_tokens: tuple[HeldToken, ...] = ()
    """Tokens with log probabilities that have given it."""


class DetokenizeItem(_Message, frozen=True):
    """New tokens of one choice of a request."""

    state: TextState
    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    is_last: bool
    logprobs: tuple[TokenLogprobs, ...] = ()


class DetokenizeRequest(_Message, frozen=True):
    """New tokens of any number of requests: those of a step travel together."""

    items: tuple[DetokenizeItem, ...]

    @property
    def work(self) -> int:
        """In microseconds, roughly."""
        return sum(20 + 5 * len(item.tokens) for item in self.items)


class DetokenizedItem(_Message, frozen=True):
    state: TextState
    text: str
    is_stopped: bool
    """Whether a stop string was found: the text ends before it."""
    used_tokens: int
    """Tokens up to where the stop string ends; all if there is none."""
    logprobs: tuple[TokenText, ...] = ()
    """Of the tokens whose text has been passed on, if they were asked for."""


class Detokenized(_Message, frozen=True):
    items: tuple[DetokenizedItem, ...]

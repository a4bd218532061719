"""What crosses processes. All of it frozen, compact and free of behaviour.

1. A call to a stage carries a tuple of requests and returns a tuple of replies, in order. Requests that wait for the
   same stage can therefore share one actor call; each keeps its own envelope, times and outcome.
2. An ``Envelope`` is what every stage needs to know of the request: its trace (the caller's hop span, as W3C text),
   its id for logs, and how much of its time is left.
3. Every ``Reply`` says how long the stage held the request by its own monotonic clock. The caller's duration less this
   one is the cost of the hop; clocks of two machines are never subtracted from each other.
4. Sequences of token ids are one flat array and their lengths, not lists of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from deployments.errors import Failure

Ids = npt.NDArray[np.int32]
Result = TypeVar("Result")
Task = Literal["embeddings", "text-classification", "token-classification", "fill-mask"]


@dataclass(frozen=True, slots=True)
class Carrier:
    """W3C trace context of the span that the receiver's spans are children of."""

    traceparent: str
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Envelope:
    carrier: Carrier
    request_id: str
    remaining_ms: float
    """Milliseconds until the deadline, counted when the message was sent."""
    sent_unix_ns: int
    """Sender's wall clock: only to tell whether the receiver was ready by then, never to measure a duration."""


@dataclass(frozen=True, slots=True)
class Ragged:
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


@dataclass(frozen=True, slots=True)
class Reply(Generic[Result]):
    """A stage's answer for one request: a result or a failure, and how long the stage had the request."""

    held_ns: int
    result: Result | None = None
    failure: Failure | None = None


# --- tokenizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    envelope: Envelope
    inputs: tuple[str, ...] | tuple[tuple[int, ...], ...]
    """Texts, or token ids that the caller made itself (used as they are, no special tokens added)."""
    truncate: bool
    param: str
    """The request field that the inputs came from, for error messages."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    ids: Ragged
    truncated: tuple[bool, ...]
    offsets: Ragged | None = None
    """Characters ``[tokens, 2]`` of each token, special tokens as ``(0, 0)``: only for token-classification."""


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PredictRequest:
    envelope: Envelope
    ids: Ragged
    param: str


@dataclass(frozen=True, slots=True)
class Predicted:
    outputs: tuple[Any, ...]
    """One per input, see ``engine.base.Output``."""
    forward_ns: int
    """The union of the runs that the request was in. The rest of ``Reply.held_ns`` it was in the queue."""
    device: str


# --- postprocessor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the caller wants the answer. ``route`` decides the shape, the others apply to the tasks that know them."""

    route: Literal["/v1/embeddings", "/predict"]
    top_k: int | None = None
    dimensions: int | None = None
    base64: bool = False


@dataclass(frozen=True, slots=True)
class PostprocessRequest:
    envelope: Envelope
    tokenized: Tokenized
    outputs: tuple[Any, ...]
    options: AnswerOptions
    texts: tuple[str, ...] = field(default=())
    """Only for token-classification."""


@dataclass(frozen=True, slots=True)
class Answer:
    fragments: tuple[bytes, ...]
    """One JSON object per input. Numbers become text here, in a stage that scales, not in the ingress."""

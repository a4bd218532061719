"""Messages between processes. All are frozen, compact and free of behaviour.

1. A ``Call`` is a request to a stage with its ``Envelope``: its trace context (the caller's hop span, as W3C text), its
   id for logs, and the time left until its deadline.
2. An actor call carries a tuple of ``Call`` objects, because requests that wait for the same stage share one; each
   keeps its own times and outcome. Replies arrive as a tuple in the same order, or, from the model, as tuples of
   ``(index, reply)`` as they become ready.
3. Every ``Reply`` reports how long the stage held the request, by the stage's monotonic clock. The caller's duration
   minus this one is the cost of the hop; clocks of different machines are never subtracted from each other.
4. ``cost_us`` estimates how long a request keeps its stage busy, excluding the model, so that large requests are sent
   alone.
5. Sequences of token ids are sent as one flat array and their lengths, not as lists of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from deployments.errors import Failure

Ids = npt.NDArray[np.int32]
Request = TypeVar("Request")
Result = TypeVar("Result")
INPUT_COST_US = 50
"""Cost of one input in the model replica, excluding the model itself."""
Task = Literal["embeddings", "text-classification", "token-classification", "fill-mask"]


class _Message:
    """Pickles as a call of the class: the default pickling of dataclasses costs ten times as much."""

    __slots__: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Carrier(_Message):
    """W3C trace context of the span that the receiver's spans are children of."""

    traceparent: str
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Envelope(_Message):
    carrier: Carrier
    request_id: str
    remaining_ms: float
    """Milliseconds until the deadline, measured when the message was sent."""
    sent_unix_ns: int
    """Sender's wall clock: used only to check whether the receiver was ready by then, never to measure a duration."""


@dataclass(frozen=True, slots=True)
class Call(_Message, Generic[Request]):
    """One request to a stage."""

    envelope: Envelope
    request: Request


@dataclass(frozen=True, slots=True)
class Ragged(_Message):
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
class Reply(_Message, Generic[Result]):
    """What a stage sends back for one request: a result or a failure, and how long the stage held the request."""

    held_ns: int
    result: Result | None = None
    failure: Failure | None = None


# --- tokenizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenizeRequest(_Message):
    inputs: tuple[str, ...] | tuple[tuple[int, ...], ...]
    """Texts, or token ids supplied by the caller (used as they are, without adding special tokens)."""
    truncate: bool
    param: str
    """The request field that the inputs came from, for error messages."""

    @property
    def cost_us(self) -> int:
        return 50 + sum(map(len, self.inputs))


@dataclass(frozen=True, slots=True)
class Tokenized(_Message):
    ids: Ragged
    truncated: tuple[bool, ...]
    offsets: Ragged | None = None
    """Start and end of each token, ``[tokens, 2]``; ``(-1, -1)`` for special tokens. Only for token-classification."""


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PredictRequest(_Message):
    ids: Ragged
    param: str

    @property
    def cost_us(self) -> int:
        return INPUT_COST_US * len(self.ids.lengths)


@dataclass(frozen=True, slots=True)
class Predicted(_Message):
    outputs: tuple[Any, ...]
    """One per input, see ``engine.protocol.Output``."""
    forward_ns: int
    """Length of the union of the runs that the request was in. It spent the rest of ``Reply.held_ns`` in the queue."""
    device: str


# --- postprocessor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutputOptions(_Message):
    """Output options of a request. ``route`` decides the shape; the others apply to the tasks that support them."""

    route: Literal["/v1/embeddings", "/predict"]
    top_k: int | None = None
    dimensions: int | None = None
    base64: bool = False


@dataclass(frozen=True, slots=True)
class PostprocessRequest(_Message):
    tokenized: Tokenized
    outputs: tuple[Any, ...]
    options: OutputOptions
    texts: tuple[str, ...] = field(default=())
    """Only for token-classification."""

    @property
    def cost_us(self) -> int:
        # A fill-mask candidate is decoded to text; a number is only formatted.
        return sum(50 + (output.size // 5 if isinstance(output, np.ndarray) else 5_000) for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Postprocessed(_Message):
    fragments: tuple[bytes, ...]
    """One JSON object per input. Numbers are formatted as text in this stage, which scales, not in the ingress."""

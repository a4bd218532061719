"""Messages as bytes: msgpack by the schema of ``messages``. Nothing that arrives can name code to run.

Arrays are MessagePack extensions: a dtype, the shape and the raw little-endian bytes; a received array is a view of its
frame.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

_ARRAY: Final = 1
_DTYPES = tuple(np.dtype(name) for name in ("<f4", "<i4", "<i8", "<f8", "<u1"))
_MAX_DIMENSIONS = 4

Message = TypeVar("Message")


class DecodeError(Exception):
    """The bytes are not a message of the schema."""


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    if not isinstance(value, np.ndarray) or value.dtype not in _DTYPES or value.ndim > _MAX_DIMENSIONS:
        raise NotImplementedError(f"{type(value).__name__} has no form on the wire")
    head = struct.pack(f"!BB{value.ndim}I", _DTYPES.index(value.dtype), value.ndim, *value.shape)
    return msgspec.msgpack.Ext(_ARRAY, head + value.tobytes())


def _decode_array(code: int, data: memoryview) -> npt.NDArray[Any]:
    if code != _ARRAY or len(data) < 2:
        raise msgspec.ValidationError(f"unknown extension {code}")
    dtype, dimensions = data[0], data[1]
    if dtype >= len(_DTYPES) or dimensions > _MAX_DIMENSIONS or len(data) < 2 + 4 * dimensions:
        raise msgspec.ValidationError("malformed array")
    shape = struct.unpack_from(f"!{dimensions}I", data, 2)
    begin = 2 + 4 * dimensions
    if math.prod(shape) * _DTYPES[dtype].itemsize != len(data) - begin:
        raise msgspec.ValidationError("an array's shape does not match its size")
    return np.frombuffer(data, _DTYPES[dtype], offset=begin).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
encode = _encoder.encode


class Decoder(Generic[Message]):
    """Decodes one type of message."""

    def __init__(self, message: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(message, ext_hook=_decode_array).decode

    def decode(self, data: bytes | memoryview) -> Message:
        """Raises DecodeError, and nothing else, whatever the bytes are."""
        try:
            message: Message = self._decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DecodeError(str(error)) from None
        return message

"""The protocol's messages, from ``grpc_predict_v2.binpb``.

They live in a pool of their own: clients bring the same names in files of their own, and protobuf does not allow two
of a name in one pool. Run as a module, it compiles ``grpc_predict_v2.proto``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTO = Path(__file__).with_name("grpc_predict_v2.proto")
COMPILED = PROTO.with_suffix(".binpb")
SERVICE = "inference.GRPCInferenceService"


def compile_proto() -> bytes:
    """Compile the ``.proto``. Needs grpcio-tools."""
    from grpc_tools import protoc

    protoc.main(["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={COMPILED}", str(PROTO)])
    return COMPILED.read_bytes()


def _file() -> bytes:
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file
    return file.SerializeToString()


if __name__ == "__main__":
    compile_proto()
else:
    _pool = descriptor_pool.DescriptorPool()
    _pool.AddSerializedFile(_file())
    _module = sys.modules[__name__]
    METHODS: dict[str, tuple[Any, Any]] = {}
    """Types of request and response, by method."""
    for _method in _pool.FindServiceByName(SERVICE).methods:
        METHODS[_method.name] = (
            message_factory.GetMessageClass(_method.input_type),
            message_factory.GetMessageClass(_method.output_type),
        )
        for _class in METHODS[_method.name]:
            # Serve pickles messages by the module and the name of their class.
            _class.__module__ = __name__
            setattr(_module, _class.__name__, _class)


def make_known() -> None:
    """Add the messages to the pool of the process, where gRPC's reflection looks for them."""
    try:
        descriptor_pool.Default().AddSerializedFile(_file())
    except TypeError:
        # A client's file is there already: it describes the same.
        return

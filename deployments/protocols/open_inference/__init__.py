"""The Open Inference Protocol, version 2, over HTTP and gRPC, as Triton, KServe and their clients speak it."""

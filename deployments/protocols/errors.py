"""What an error looks like in each API: its HTTP status and its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.errors import ApiError

ErrorForm = Callable[[ApiError], tuple[int, Any]]


def openai_error(error: ApiError) -> tuple[int, Any]:
    return error.status, error.body()


def open_inference_error(error: ApiError) -> tuple[int, Any]:
    """A message alone; what is wrong with a request is 400, whatever it is."""
    return 400 if error.status in (413, 422) else error.status, {"error": error.message}


def cohere_error(error: ApiError) -> tuple[int, Any]:
    return error.status, {"message": error.message}


_TYPES = {
    401: "Unauthorized",
    413: "Validation",
    422: "Validation",
    424: "Backend",
    429: "Overloaded",
    503: "Unhealthy",
}


def embeddings_inference_error(error: ApiError) -> tuple[int, Any]:
    return error.status, {"error": error.message, "error_type": _TYPES.get(error.status, "Backend")}

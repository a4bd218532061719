"""Every way a request can fail, and the HTTP status of each.

A stage that fails a request raises an ``ApiError``; between actors it travels as a ``Failure`` inside the reply,
because an exception that crosses an actor call costs a pickled stack trace and a log line. Messages state the rule
and the value that broke it; they never contain input text, because they also go into telemetry.
"""

from __future__ import annotations

import msgspec


class ConfigError(ValueError):
    """A configuration value is invalid; the message names its key. Raised only at startup."""


class ApiError(Exception):
    """A request failure with a status and a message for the client.

    Attributes:
        status: HTTP status.
        type: OpenAI's error type (``invalid_request_error``, ``rate_limit_error``, ...).
        code: a stable identifier for programs to match.
        outcome: the value of ``outcome`` on the counter ``ai.inference.requests``.
        param: the request field at fault, if any.
        retry_after_s: seconds for ``Retry-After``, if a retry makes sense.
    """

    status = 500
    type = "internal_error"
    code = "internal_error"
    outcome = "error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body, in the shape that OpenAI's clients parse."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidJson(ApiError):
    status, type, code, outcome = 400, "invalid_request_error", "invalid_json", "invalid"


class InvalidField(ApiError):
    status, type, code, outcome = 422, "invalid_request_error", "invalid_field", "invalid"


class TooLarge(ApiError):
    status, type, code, outcome = 413, "invalid_request_error", "too_large", "invalid"


class Unauthorized(ApiError):
    status, type, code, outcome = 401, "invalid_request_error", "invalid_api_key", "invalid"


class ModelNotFound(ApiError):
    status, type, code, outcome = 404, "invalid_request_error", "model_not_found", "invalid"


class NotFound(ApiError):
    status, type, code, outcome = 404, "invalid_request_error", "not_found", "invalid"


class QueueFull(ApiError):
    status, type, code, outcome = 429, "rate_limit_error", "queue_full", "overloaded"


class NoReplicaReady(ApiError):
    status, type, code, outcome = 503, "service_unavailable_error", "no_replica_ready", "overloaded"


class ReplicaDied(ApiError):
    status, type, code, outcome = 503, "service_unavailable_error", "replica_died", "error"


class SourceUnavailable(ApiError):
    """The page's traces do not exist, or the server that holds them does not respond."""

    status, type, code, outcome = 503, "service_unavailable_error", "source_unavailable", "error"


class DeadlinePassed(ApiError):
    status, type, code, outcome = 504, "timeout_error", "deadline_passed", "deadline"


class BodyTooSlow(ApiError):
    status, type, code, outcome = 408, "timeout_error", "body_too_slow", "invalid"


class Cancelled(ApiError):
    """The client disconnected. The response is never read; 499 is the status that proxies log in this case."""

    status, type, code, outcome = 499, "client_closed_request", "cancelled", "cancelled"


class ModelFailed(ApiError):
    """The model raised an exception on this input alone."""

    status, type, code, outcome = 500, "internal_error", "model_failed", "error"


class InternalError(ApiError):
    """An internal fault. The message contains the trace id and no other details."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An ``ApiError`` as sent in a reply: the class name and the arguments."""

    kind: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    @classmethod
    def of(cls, error: ApiError) -> Failure:
        return cls(type(error).__name__, error.message, error.param, error.retry_after_s)

    def error(self) -> ApiError:
        return _KINDS[self.kind](self.message, param=self.param, retry_after_s=self.retry_after_s)


_KINDS: dict[str, type[ApiError]] = {kind.__name__: kind for kind in ApiError.__subclasses__()}
OUTCOMES = ("ok", *sorted({kind.outcome for kind in _KINDS.values()}))
"""All values of ``outcome``."""

"""The one error tree. It knows statuses and retryability, not HTTP or gRPC libraries.

ServeError                  500  INTERNAL
├── InvalidRequest          400  INVALID_ARGUMENT
│   ├── PromptTooLong       400  INVALID_ARGUMENT
│   └── ModelNotFound       404  NOT_FOUND
├── Unauthorized            401  UNAUTHENTICATED
├── Overloaded              429  RESOURCE_EXHAUSTED   carries retry_after_s; nothing was started
├── DeadlineExceeded        504  DEADLINE_EXCEEDED
├── Cancelled               499  CANCELLED
├── Unavailable             503  UNAVAILABLE          retryable
│   ├── WorkerLost
│   └── TransferError
└── LayoutMismatch          500  FAILED_PRECONDITION

Conversion to a status happens in exactly two places: the router's front doors and a worker's service.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """A failure that the client sees under a stable `code`."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False  # may another worker succeed with the same request?

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ServeError):
    """The request can never succeed as it stands."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    code = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """No such model is served."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    code = "model_not_found"


class Unauthorized(ServeError):
    """Missing or wrong API key or cluster secret."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    code = "invalid_api_key"


class Overloaded(ServeError):
    """No room; nothing was started. `retry_after_s` says when to come back."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServeError):
    """The request's own time budget ran out."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    code = "deadline_exceeded"


class Cancelled(ServeError):
    """The client went away or cancelled."""

    http_status = 499
    grpc_status = "CANCELLED"
    code = "cancelled"


class Unavailable(ServeError):
    """A part of the system that the request needed is not there (any more)."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    code = "unavailable"
    retryable = True


class WorkerLost(Unavailable):
    """The worker that held the request died or fell silent."""

    code = "worker_lost"


class TransferError(Unavailable):
    """KV did not arrive whole and verified."""

    code = "kv_transfer_failed"


class LayoutMismatch(ServeError):
    """Two workers whose KV can not be converted into each other."""

    grpc_status = "FAILED_PRECONDITION"
    code = "layout_mismatch"


def _tree(cls: type[ServeError]) -> dict[str, type[ServeError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


def from_code(code: str, message: str) -> ServeError:
    """The error that `code` names, as rebuilt from a wire message; an unknown code is a ServeError."""
    return _tree(ServeError).get(code, ServeError)(message)

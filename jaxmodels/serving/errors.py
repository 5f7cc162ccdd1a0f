"""Errors as the API tells them: a status, and the body that OpenAI's clients read."""

import dataclasses
import math
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from jaxmodels.data.features.base import Problem
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.serving.requests import Busy
from jaxmodels.tokenizers.chat_template import TemplateProblem

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
    504: "timeout_error",
}


@dataclasses.dataclass
class ApiError(Exception):
    """A request is refused, or failed.

    Attributes:
      status: of HTTP.
      message: one line: the cause and a remedy.
      param: the key of the request that is wrong, if it is one.
      code: a name that programs can tell errors apart by.
      headers: of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self):
        return self.message

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that is wrong."""
    return ApiError(400, message, param, code)


def unavailable(message: str, retry_after: float = 1.0) -> ApiError:
    """Return the error of a service that takes no requests now."""
    return ApiError(503, message, code="unavailable", headers=_retry_after(retry_after))


def as_api_error(error: BaseException) -> ApiError:
    """Return how an exception is told to a client. What is no one's mistake but the server's is printed here, and told without details."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(429, _line(error), code="queue_full", headers=_retry_after(error.retry_after))
        case TemplateProblem():
            return bad(f"the chat template refuses the conversation: {_line(error)}.".replace("..", "."), "messages", "template_error")
        case ConfigError() | Problem():
            return bad(_line(error))
        case TimeoutError():
            return ApiError(504, "the request took longer than the server allows (--time_limit).", code="timeout")
        case RunError():
            return ApiError(500, _line(error), code="failed")
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "an error of the server: its log has the details.", code="internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

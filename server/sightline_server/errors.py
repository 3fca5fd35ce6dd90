"""Every error a client can see, each with its HTTP status and OpenAI code.

Knows statuses, codes and sentences. Knows nothing of FastAPI: `app.py` turns these into responses.
"""

from typing import ClassVar


class ApiError(Exception):
    """A failure with a public sentence. ``message`` never holds a path, an address or a traceback."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object, all four keys present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class InvalidKey(ApiError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class OriginRefused(ApiError):
    """A Host or an Origin that a page of somebody else's would send."""

    status = 403
    type = "invalid_request_error"
    default_code = "origin_not_allowed"


class Forbidden(ApiError):
    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_scope"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    default_code = "model_not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(ApiError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class UrlTooLong(ApiError):
    status = 414
    type = "invalid_request_error"
    default_code = "url_too_long"


class HeadersTooLarge(ApiError):
    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class RateLimited(ApiError):
    """One key's own limit, whatever the others do."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class ServerFault(ApiError):
    """Our own bug or an unexpected failure; the sentence says no more than that and the request id is in the log."""

    status = 500
    default_code = "server_error"


class Unavailable(ApiError):
    """503: overloaded, queued for too long, draining, or the engine is (re)starting or out of memory."""

    status = 503
    type = "service_unavailable_error"
    default_code = "server_is_overloaded"

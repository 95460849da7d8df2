"""Errors that a client sees. Their form is the OpenAI API's, as vLLM writes it."""

from __future__ import annotations

import orjson

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    417: "ExpectationFailedError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
    505: "BadRequestError",
}
# The same in Anthropic's API (https://docs.anthropic.com/en/api/errors). Any other status is an "api_error".
MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
MESSAGES_PATH = b"/v1/messages"


class ApiError(Exception):
    """A request that the router answers with an error.

    status: the HTTP status. message: for people. param: the field of the body at fault, if there is one.
    retry_after_s: whole seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        # They may repeat a client's words, in which a surrogate may stand on its own. No answer could have that.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.retry_after_s = retry_after_s

    def body_for(self, path: bytes) -> bytes:
        """The error in the form of the API that `path` belongs to."""
        return self.messages_body() if path.startswith(MESSAGES_PATH) else self.body()

    def messages_body(self) -> bytes:
        """The error as Anthropic's API writes it: {"type": "error", "error": {"type", "message"}}."""
        error = {"type": MESSAGES_TYPES.get(self.status, "api_error"), "message": self.message}
        return orjson.dumps({"type": "error", "error": error})

    @property
    def type(self) -> str:
        """Its name in the API."""
        return TYPES.get(self.status) or TYPES[400 if self.status < 500 else 500]

    def body(self) -> bytes:
        """The error as JSON: {"error": {"message", "type", "param", "code"}}."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return orjson.dumps({"error": error})

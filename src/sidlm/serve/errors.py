"""Errors of the API: an HTTP status and a body that names the field, as clients of the OpenAI API read it."""

from typing import Any


class ApiError(Exception):
    """An answer other than success. param: the field of the request that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str, message: str, *, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)

"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from moss_audio_jax.files import brief

TOO_LONG = "context_length_exceeded"  # OpenAI's code
_MOST = 1000  # characters of a message: it may quote what a client sent


class ApiError(Exception):
    """A request that is refused, or an answer that failed.

    Attributes:
      status: of HTTP.
      code: for programs, such as "model_not_found".
      param: the field that is wrong.
      headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": brief(str(self), _MOST),
                "type": kind.get(self.status, other),
                "param": None if self.param is None else brief(self.param, 80),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be used as it is."""
    return ApiError(400, message, code, param)


def busy(message: str, seconds: int) -> ApiError:
    """There is no place now; a client may try again after some seconds."""
    return ApiError(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def unavailable(message: str) -> ApiError:
    """This server answers nothing any more; another one may."""
    return ApiError(503, message, "unavailable", headers={"Retry-After": "30"})


def too_late(seconds: float) -> ApiError:
    return ApiError(
        504, f"the answer took longer than {seconds:g} s, the limit of this server", "timeout"
    )

"""What every request passes first: limits of its size and time, and the counters."""

import asyncio
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidlm.serve.config import ServeConfig
from sidlm.serve.errors import ApiError
from sidlm.serve.metrics import Metrics

_PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/openapi.json")
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")


class Gate:
    """ASGI middleware: reads the whole request, within bounds, before the application sees any of it."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                async with asyncio.timeout(self.config.body_seconds):
                    body = await self._read(scope, receive)
            except TimeoutError:
                raise ApiError(408, f"the request did not arrive in {self.config.body_seconds:g} seconds") from None
        except ApiError as error:
            # what is left of the request is not read: the connection cannot serve another one
            answer = JSONResponse(error.body(), error.status, {"Connection": "close"})
            await answer(scope, receive, watched)
        else:
            if body is not None:
                await self.app(scope, _replayed(body, receive), watched)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            # without an answer the client went away first
            self.metrics.add("sid_http_requests_total", path=path, method=method, status=str(status or 499))
            self.metrics.observe("sid_http_request_seconds", time.monotonic() - start)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's body; None if the client went before its end. Raises ApiError for one that is too long."""
        limit = self.config.max_body_bytes
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > limit:
            raise ApiError(413, f"the request has {int(told)} bytes, this server takes {limit}")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise ApiError(413, f"the request has more than the {limit} bytes that this server takes")
            if not message.get("more_body"):
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body as one message, then whatever else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

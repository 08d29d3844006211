"""The HTTP server: an OpenAI-compatible API over one model."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from sidlm import __version__
from sidlm.data.tokenizer import Tokenizer, clean
from sidlm.errors import SidError
from sidlm.serve import metrics as prometheus
from sidlm.serve import schema
from sidlm.serve.answers import CallReader, Writer, event, tool_calls
from sidlm.serve.config import ServeConfig
from sidlm.serve.engine import Busy, Closing, Engine, Job, OutOfTime
from sidlm.serve.errors import ApiError, bad
from sidlm.serve.gate import Gate
from sidlm.serve.requests import Translator

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody, "description": about}
    for status, about in (
        (400, "a field cannot be honoured; `param` names it"),
        (404, "no such model"),
        (408, "the request did not arrive in time"),
        (413, "the request is too long"),
        (429, "too many requests wait"),
        (500, "a fault of the server"),
        (503, "the server is going down, or had no time for the request"),
    )
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_ANSWER = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _EVENT}}
_STREAMED = {200: {"description": "the answer, or its chunks as server-sent events", "content": _ANSWER}}


def create_app(model: "SidForCausalLM", tokenizer: Tokenizer, config: ServeConfig) -> FastAPI:
    """The ASGI application. Its lifespan ends the model's thread."""
    metrics = prometheus.Metrics()
    metrics.counter("sid_http_requests_total", "Requests by path and status.")
    metrics.histogram("sid_http_request_seconds", "Time from a request to the end of its answer.")
    engine = Engine(model, tokenizer, max_queue=config.max_queue, metrics=metrics)
    api = Api(engine, Translator(model, tokenizer, config), config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    app = FastAPI(title="Sid", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_routes(app, api, metrics)
    app.add_middleware(Gate, config=config, metrics=metrics)
    return app


def _add_routes(app: FastAPI, api: "Api", metrics: prometheus.Metrics) -> None:
    card = {"id": api.config.name, "object": "model", "created": int(time.time()), "owned_by": "sid"}

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        if api.engine.closed:
            raise ApiError(503, "the server is shutting down")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(metrics.text(), media_type=prometheus.CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name}", responses={404: _ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """One model by name."""
        if name != api.config.name:
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return card

    @app.post("/v1/chat/completions", responses=_STREAMED | _ERRORS)  # type: ignore[operator]
    async def chat(body: schema.ChatRequest, request: Request) -> Response:
        """An assistant's next message."""
        job = await anyio.to_thread.run_sync(api.translator.chat_job, body)
        return await api.answer(request, body, [job], chat=True)

    @app.post("/v1/completions", responses=_STREAMED | _ERRORS)  # type: ignore[operator]
    async def completions(body: schema.CompletionRequest, request: Request) -> Response:
        """The continuation of a text."""
        jobs = await anyio.to_thread.run_sync(api.translator.completion_jobs, body)
        return await api.answer(request, body, jobs, chat=False)

    known = app.openapi

    def openapi() -> dict[str, Any]:
        # FastAPI announces its own answer to bad requests, which is not given here, and does not know the model's name
        document = known()
        for request in ("ChatRequest", "CompletionRequest"):
            document["components"]["schemas"][request]["properties"]["model"]["enum"] = [api.config.name]
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError, headers: Any = None) -> Response:
        error.message = clean(error.message)[:2000]
        error.param = None if error.param is None else clean(error.param)[:200]
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(Busy)
    @app.exception_handler(Closing)
    @app.exception_handler(OutOfTime)
    @app.exception_handler(SidError)
    async def engine_error(_: Request, error: Exception) -> Response:
        said = _said(error)
        return answer(said, {"Retry-After": "1"} if said.status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        unknown, said = first["type"] == "extra_forbidden", first["msg"].removeprefix("Value error, ")
        message = f"{where}: unknown or unsupported field" if unknown else f"{where or 'body'}: {said}"
        return answer(bad(where, message))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        # the traceback goes to the log; it is nothing for a client
        return answer(ApiError(500, "internal error"))


def _said(error: Exception) -> ApiError:
    """An error of the engine as one of the API."""
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, (Closing, OutOfTime)):
        return ApiError(503, str(error), code="timeout" if isinstance(error, OutOfTime) else "closing")
    return ApiError(400, clean(str(error)))


class Api:
    """The answers of both endpoints."""

    def __init__(self, engine: Engine, translator: Translator, config: ServeConfig) -> None:
        self.engine = engine
        self.translator = translator
        self.config = config

    async def answer(self, request: Request, body: Any, jobs: list[Job], *, chat: bool) -> Response:
        """The whole answer, or its chunks. jobs: one for each prompt, each done n times."""
        self.engine.check_room()
        n = body.n or 1
        each = [_nth(job, i) for job in jobs for i in range(n)]
        prompt_tokens = sum(len(job.prompt) for job in jobs)
        writer = Writer(
            model=self.config.name, chat=chat, tokenizer=self.engine.tokenizer, stop_ids=jobs[0].stop_ids,
            prompt_tokens=prompt_tokens,
        )  # fmt: skip
        names = _names(body) if chat else ()
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = self._stream(writer, each, names, usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

        async def whole() -> Response:
            choices = [await self._choice(writer, i, job, names) for i, job in enumerate(each)]
            return JSONResponse(writer.whole(choices))

        return await _while_connected(request, whole())

    async def _choice(self, writer: Writer, index: int, job: Job, names: Any) -> dict[str, Any]:
        text, chosen, finish = "", [], None
        async for piece in self.engine.run(job):
            text += piece.text
            chosen += piece.chosen
            finish = piece.finish
        writer.completion_tokens += len(chosen)
        choice: dict[str, Any] = {"index": index, "logprobs": writer.logprobs(chosen), "finish_reason": finish}
        if not writer.chat:
            return choice | {"text": text}
        reader = CallReader(names)
        reader.python_tag = bool(chosen) and chosen[0].id == self._python_tag
        text = reader.feed(text)
        rest, calls = reader.end()
        message: dict[str, Any] = {"role": "assistant", "content": text + rest, "refusal": None}
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": tool_calls(calls)}
            choice["finish_reason"] = "tool_calls" if finish == "stop" else finish
        return choice | {"message": message}

    @property
    def _python_tag(self) -> int | None:
        return self.engine.tokenizer.special_ids.get("<|python_tag|>")

    async def _stream(self, writer: Writer, jobs: list[Job], names: Any, usage: bool) -> AsyncIterator[str]:
        try:
            for index, job in enumerate(jobs):
                one = self._stream_chat if writer.chat else self._stream_text
                async for choice in one(writer, index, job, names):
                    yield writer.chunk(choice, usage=usage)
            if usage:
                yield writer.chunk(None, usage=True)
            yield "data: [DONE]\n\n"
        except (Busy, Closing, OutOfTime, SidError) as error:  # the status has been sent
            yield event(_said(error).body())
        except Exception:
            yield event(ApiError(500, "internal error").body())
            raise  # to the log

    async def _stream_text(self, writer: Writer, index: int, job: Job, _: Any) -> AsyncIterator[dict[str, Any]]:
        offset = 0
        async for piece in self.engine.run(job):
            writer.completion_tokens += len(piece.chosen)
            logprobs = writer.logprobs(piece.chosen, offset)
            offset += len(piece.text)
            if piece.text or logprobs or piece.finish:
                yield {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    async def _stream_chat(self, writer: Writer, index: int, job: Job, names: Any) -> AsyncIterator[dict[str, Any]]:
        def choice(delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

        reader, first = CallReader(names), True
        async for piece in self.engine.run(job):
            if first:
                yield choice({"role": "assistant", "content": ""})
                reader.python_tag = bool(piece.chosen) and piece.chosen[0].id == self._python_tag
                first = False
            writer.completion_tokens += len(piece.chosen)
            text, logprobs = reader.feed(piece.text), writer.logprobs(piece.chosen)
            if text or logprobs:
                yield choice({"content": text}, logprobs)
            if piece.finish is None:
                continue
            rest, calls = reader.end()
            if rest:
                yield choice({"content": rest})
            if calls:
                yield choice({"tool_calls": tool_calls(calls, indexed=True)})
            yield choice({}, finish="tool_calls" if calls and piece.finish == "stop" else piece.finish)


def _nth(job: Job, index: int) -> Job:
    """The same job with draws and a grammar of its own."""
    seed = job.sampling.seed
    sampling = job.sampling if seed is None else replace(job.sampling, seed=seed + index)
    return replace(job, sampling=sampling, grammar=job.grammar.copy() if job.grammar else None)


def _names(body: schema.ChatRequest) -> tuple[str, ...]:
    """The tools that an answer may call."""
    return () if body.tool_choice == "none" else tuple(tool.function.name for tool in body.tools or ())


async def _while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """The work's result; the work is cancelled when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=499)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

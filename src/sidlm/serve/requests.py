"""Requests of the API as jobs of the engine; what cannot be honoured is refused, with the name of the field."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sidlm.data.tokenizer import Tokenizer
from sidlm.errors import SidError
from sidlm.post.chat import ChatFormat, Message, message_of, with_tools
from sidlm.serve import schema
from sidlm.serve.config import ServeConfig
from sidlm.serve.decode import Sampling, end_ids
from sidlm.serve.engine import Job
from sidlm.serve.errors import ApiError, bad
from sidlm.serve.grammar import Grammar, GrammarCompiler

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM


class Translator:
    """Makes jobs of requests, for one model."""

    def __init__(self, model: "SidForCausalLM", tokenizer: Tokenizer, config: ServeConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.positions: int = model.config.max_position_embeddings
        self.vocab_size: int = min(model.config.vocab_size, tokenizer.vocab_size)
        self._ends = end_ids(model, tokenizer)
        self.chat = self._optional(lambda: ChatFormat(tokenizer, tool_format=config.tool_format))
        self._grammars = self._optional(lambda: GrammarCompiler(tokenizer))

    @staticmethod
    def _optional(make):
        """What `make` gives, or its error: a model without a chat format still completes text."""
        try:
            return make()
        except SidError as error:
            return error

    def chat_job(self, request: schema.ChatRequest) -> Job:
        """The job of one choice of a chat. Raises ApiError."""
        self._check_model(request)
        if isinstance(self.chat, SidError):
            raise bad("messages", str(self.chat))
        tools = self._tools(request)
        try:
            messages = with_tools(self._messages(request.messages), tools, tool_format=self.config.tool_format)
            prompt = self.chat.encode(messages)
        except SidError as error:
            raise bad("messages", str(error)) from error
        if request.top_logprobs is not None and not request.logprobs:
            raise bad("top_logprobs", "top_logprobs needs logprobs: true")
        asked = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(asked) > 1:
            raise bad("max_tokens", "max_tokens and max_completion_tokens differ")
        sampling = self._sampling(request, "messages", len(prompt), asked.pop() if asked else None)
        if request.logprobs:
            sampling = replace(sampling, top_logprobs=request.top_logprobs or 0)
        return Job(
            prompt=prompt,
            sampling=sampling,
            stop_ids=self.chat.stop_ids,
            stop=_stops(request),
            grammar=self._grammar(request, tools),
            seconds=self.config.request_seconds,
        )

    def completion_jobs(self, request: schema.CompletionRequest) -> list[Job]:
        """The job of one choice for each prompt. Raises ApiError."""
        self._check_model(request)
        prompts = [self._prompt(prompt) for prompt in _prompts(request)]
        if len(prompts) * (request.n or 1) > self.config.max_choices:
            raise bad("prompt", f"{len(prompts)} prompts with n={request.n or 1}: more than {self.config.max_choices}")
        jobs = []
        for prompt in prompts:
            sampling = self._sampling(request, "prompt", len(prompt), request.max_tokens or 16)
            jobs.append(
                Job(
                    prompt=prompt,
                    sampling=replace(sampling, top_logprobs=request.logprobs),
                    stop_ids=self._ends,
                    stop=_stops(request),
                    seconds=self.config.request_seconds,
                )
            )
        return jobs

    def _check_model(self, request: schema.Common) -> None:
        if request.model != self.config.name:
            message = f"the model {request.model!r} does not exist; this server has {self.config.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if request.n is not None and request.n > self.config.max_choices:
            raise bad("n", f"n is {request.n}, this server allows {self.config.max_choices}")
        if request.stream_options is not None and not request.stream:
            raise bad("stream_options", "stream_options needs stream: true")

    def _messages(self, messages: Sequence[schema.Message]) -> list[Message]:
        """Checked one by one; a tool's answer must be to a call that was made before it."""
        calls: set[str] = set()
        out = []
        for i, message in enumerate(messages):
            where = f"messages.{i}"
            if message.tool_calls is not None and message.role != "assistant":
                raise bad(f"{where}.tool_calls", f"a message of the role {message.role} calls no tools")
            if message.tool_call_id is not None and message.role != "tool":
                raise bad(f"{where}.tool_call_id", f"a message of the role {message.role} answers no call")
            if message.role == "tool" and message.tool_call_id not in calls:
                raise bad(f"{where}.tool_call_id", f"no call {message.tool_call_id!r} was made before this answer")
            if message.content is None and not message.tool_calls:
                raise bad(f"{where}.content", "a message without content calls tools")
            calls |= {call.id for call in message.tool_calls or ()}
            fields = message.model_dump(exclude_none=True)
            if message.role == "developer":  # OpenAI's newer name for it
                fields["role"] = "system"
            try:
                out.append(message_of(fields))
            except SidError as error:
                raise bad(where, str(error)) from error
        return out

    def _tools(self, request: schema.ChatRequest) -> list[dict]:
        """The functions that are offered to the model. Raises ApiError for a choice that cannot be kept."""
        functions = [tool.function for tool in request.tools or ()]
        names = [function.name for function in functions]
        repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if repeated is not None:
            raise bad("tools", f"two tools have the name {repeated!r}")
        choice = request.tool_choice
        if not functions:
            for param in ("tool_choice", "parallel_tool_calls"):
                if getattr(request, param) not in (None, "none", "auto"):
                    raise bad(param, f"{param} needs tools")
            return []
        forced = choice == "required" or isinstance(choice, schema.NamedTool)
        if isinstance(choice, schema.NamedTool) and choice.function.name not in names:
            raise bad("tool_choice", f"tool_choice names {choice.function.name!r}, which is not among the tools")
        if request.parallel_tool_calls is False and not forced and choice != "none":
            raise bad("parallel_tool_calls", "parallel_tool_calls: false is kept with a tool_choice that forces a call")
        for i, function in enumerate(functions):
            if function.strict and not forced and choice != "none":
                raise bad(f"tools.{i}.function.strict", "strict: true is kept with a tool_choice that forces a call")
        if choice == "none":
            return []
        if forced and self.config.tool_format != "json":
            raise bad("tool_choice", f"a call cannot be forced in the tool format {self.config.tool_format!r}")
        return [function.model_dump(exclude_none=True, exclude={"strict"}) for function in functions]

    def _grammar(self, request: schema.ChatRequest, tools: list[dict]) -> Grammar | None:
        wanted = request.response_format
        choice = request.tool_choice
        named = choice.function.name if isinstance(choice, schema.NamedTool) else None
        try:
            if tools and (choice == "required" or named):
                if wanted is not None and wanted.type != "text":
                    raise bad("response_format", "a forced tool call leaves no room for a response_format")
                offered = [tool for tool in tools if named in (None, tool["name"])]
                return self._compiler("tool_choice").call(offered)
            if wanted is None or wanted.type == "text":
                if wanted is not None and wanted.json_schema is not None:
                    raise bad("response_format.json_schema", "json_schema needs the type json_schema")
                return None
            if tools:
                raise bad("response_format", "JSON output and tools that may be called exclude each other")
            if wanted.type == "json_object":
                if wanted.json_schema is not None:
                    raise bad("response_format.json_schema", "json_schema needs the type json_schema")
                return self._compiler("response_format").json({"type": "object"})
            if wanted.json_schema is None:
                raise bad("response_format.json_schema", "the type json_schema needs a json_schema")
            return self._compiler("response_format").json(wanted.json_schema.schema_)
        except SidError as error:
            param = "response_format.json_schema.schema" if not tools else "tools"
            raise bad(param, str(error)) from error

    def _compiler(self, param: str) -> GrammarCompiler:
        if isinstance(self._grammars, SidError):
            raise bad(param, str(self._grammars))
        return self._grammars

    def _sampling(self, request: schema.Common, param: str, prompt: int, asked: int | None) -> Sampling:
        room = self.positions - prompt
        if room < 1:
            message = f"the prompt has {prompt} tokens, the model's context holds {self.positions} with the answer"
            raise bad(param, message, code="context_length_exceeded")
        if asked is not None and asked > self.config.max_new_tokens:
            raise bad("max_tokens", f"{asked} tokens asked for, this server allows {self.config.max_new_tokens}")
        if asked is not None and asked > room:
            message = f"{prompt} tokens of prompt and {asked} new ones exceed the model's {self.positions} positions"
            raise bad("max_tokens", message, code="context_length_exceeded")
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        beyond = next((token for token in bias if token >= self.vocab_size), None)
        if beyond is not None:
            raise bad("logit_bias", f"token id {beyond} is outside the vocabulary of {self.vocab_size}")
        given = {name: getattr(request, name) for name in _SAMPLING}
        return Sampling(
            max_new_tokens=min(room, self.config.max_new_tokens) if asked is None else asked,
            logit_bias=bias,
            seed=request.seed,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        beyond = next((token for token in prompt if token >= self.vocab_size), None)
        if beyond is not None:
            raise bad("prompt", f"token id {beyond} is outside the vocabulary of {self.vocab_size}")
        return prompt


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _stops(request: schema.Common) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _prompts(request: schema.CompletionRequest) -> list:
    prompt = request.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)

"""Llama 3's chat format (arXiv 2407.21783, section 4.1.1): messages to tokens and back.

A message is a header with its role, two newlines, its content and a token that ends it: ``<|eot_id|>`` at the end of a
turn, ``<|eom_id|>`` where the model waits for a tool. Content is encoded as text only, so that nothing a user, a tool
or a document says becomes a control token.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sidlm.data.chat_template import BUILTIN_TOOLS, NEEDED
from sidlm.data.tokenizer import Tokenizer
from sidlm.errors import SidError
from sidlm.post.tools import INTERPRETER, ToolCall, check_format, read_calls, tools_text, write_calls

ROLES = ("system", "user", "assistant", "ipython")
ENDS = ("eot", "eom")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a dialogue. Raises SidError for what the format has no form for."""

    role: str
    """system, user, assistant, or ipython: what a tool answered"""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """calls of an assistant, behind its content"""
    python_tag: bool | None = None
    """whether <|python_tag|> is in front; None: in front of code for the interpreter, as in Meta's reference"""
    end: str = "eot"
    """eot, or eom for an assistant that goes on after a tool has answered"""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise SidError(f"unknown role {self.role!r}; there are {', '.join(ROLES)}")
        if self.end not in ENDS:
            raise SidError(f"a message ends in eot or eom, got {self.end!r}")
        if self.role != "assistant" and (self.tool_calls or self.python_tag or self.end != "eot"):
            raise SidError(f"only an assistant calls tools and waits for them, not the role {self.role!r}")


class ChatFormat:
    """Encodes and parses dialogues with one tokenizer.

    tool_format: how calls of tools are written (``sidlm.post.tools``); all of them are read.
    Raises SidError if the tokenizer has no control tokens for a chat.
    """

    def __init__(self, tokenizer: Tokenizer, *, tool_format: str = "json") -> None:
        check_format(tool_format)
        missing = [name for name in NEEDED if name not in tokenizer.special_ids]
        if missing:
            raise SidError(
                f"the tokenizer has no {missing[0]}: it has no chat format (sid tokenizer train makes one that has)"
            )
        self.tokenizer = tokenizer
        self.tool_format = tool_format
        self._bos, self._start, self._stop, self._eot, self._eom, self._tag = (
            tokenizer.special_ids[name] for name in NEEDED
        )
        self.stop_ids = (tokenizer.eos_id, self._eom, self._eot)

    def encode(self, messages: Iterable[Message], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of a dialogue, begin-of-text first; with generation_prompt the header of an answer behind it."""
        return self.encode_with_targets(messages, generation_prompt=generation_prompt)[0]

    def encode_with_targets(
        self, messages: Iterable[Message], *, generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """The ids, and for each whether an assistant writes it: its content, its calls and the token that ends it."""
        ids, targets = [self._bos], [False]
        for message in messages:
            header, body = self.header(message.role), self._body(message)
            ids += header + body
            targets += [False] * len(header) + [message.role == "assistant"] * len(body)
        if generation_prompt:
            header = self.header("assistant")
            ids += header
            targets += [False] * len(header)
        return ids, targets

    def header(self, role: str) -> list[int]:
        """The tokens before the content of a message."""
        encode = self.tokenizer.encode
        return [self._start, *encode(role), self._stop, *encode("\n\n")]

    def _body(self, message: Message) -> list[int]:
        ids: list[int] = []
        calls = message.tool_calls
        tag = message.python_tag
        if tag or (tag is None and calls and calls[0].name == INTERPRETER):
            ids.append(self._tag)
        # piece by piece, as in the reference: where two pieces meet, no token spans them
        for piece in (message.content, *write_calls(calls, self.tool_format)):
            ids += self.tokenizer.encode(piece)
        return [*ids, self._eom if message.end == "eom" else self._eot]

    def parse(self, ids: Sequence[int], *, names: Collection[str] | None = None) -> Message:
        """The assistant's message in the tokens that a model wrote, with or without header and end.

        Control tokens are told by their ids, never by their names in the text. names: as in ``read_calls``.
        """
        ids, header = list(ids), self.header("assistant")
        if ids[: len(header)] == header:
            ids = ids[len(header) :]
        end = "eot"
        if ids and ids[-1] in self.stop_ids:
            end = "eom" if ids[-1] == self._eom else "eot"
            ids = ids[:-1]
        tag = ids[:1] == [self._tag]
        text = self.tokenizer.decode(ids[tag:], skip_special=True)
        content, calls = read_calls(text, python_tag=tag, names=names)
        return Message(role="assistant", content=content, tool_calls=calls, python_tag=tag, end=end)


def message_of(fields: Mapping[str, Any]) -> Message:
    """A message in the form of the OpenAI API, as TRL and transformers use it, as a Message.

    The role tool is ipython; content is text, a list of {"type": "text", "text"} or None; tool_calls hold {"function":
    {"name", "arguments": mapping or JSON}}. A call of a built-in tool has the python tag and waits for its answer.
    Raises SidError naming what cannot be said in this format.
    """
    role = fields.get("role")
    role = "ipython" if role == "tool" else role
    if not isinstance(role, str):
        raise SidError(f"a message needs a role, got {role!r}")
    calls = tuple(_call_of(call) for call in fields.get("tool_calls") or ())
    waits = fields.get("end", "eot") == "eom" or any(c.name in (*BUILTIN_TOOLS, INTERPRETER) for c in calls)
    return Message(
        role=role,
        content=_text_of(fields.get("content")),
        tool_calls=calls,
        python_tag=(True if waits else None) if calls else None,
        end="eom" if waits else fields.get("end", "eot"),
    )


def _text_of(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise SidError(f"content must be text, got a part of type {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _call_of(fields: Mapping[str, Any]) -> ToolCall:
    function = fields.get("function", fields)
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str):
        raise SidError(f"a tool call needs a name, got {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise SidError(f"arguments of the call of {name!r} are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise SidError(f"arguments of the call of {name!r} must be an object, got {arguments!r}")
    return ToolCall(name=name, arguments=arguments)


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The dialogue with text in front of its system message, a blank line between, or as its system message."""
    if messages and messages[0].role == "system":
        first = messages[0]
        return [replace(first, content=f"{text}\n{first.content}"), *messages[1:]]
    return [Message(role="system", content=text), *messages]


def with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, tool_format: str = "json"
) -> list[Message]:
    """The dialogue with tools offered in its system message; as the chat template does it, for "json"."""
    return with_system(messages, tools_text(tools, tool_format)) if tools else list(messages)

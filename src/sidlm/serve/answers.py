"""What the server answers: whole objects and streamed chunks of the OpenAI API."""

import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidlm.data.tokenizer import Tokenizer
from sidlm.post.tools import ToolCall, read_calls
from sidlm.serve.decode import Chosen
from sidlm.serve.text import StopStrings, token_bytes

LEAST_LOGPROB = -9999.0
"""JSON has no infinity"""


class CallReader:
    """Tells tool calls from text while it is still being written.

    Text that could be a call is held back until the end shows what it is; all other text is passed on.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.python_tag = False
        self._text = ""
        self._shown = 0
        self._before_tag = StopStrings(["<function="])

    def feed(self, piece: str) -> str:
        self._text += piece
        start = self._text.lstrip()[:1]
        if not self.names:
            return self._show(piece)
        if self.python_tag or start in ("", "{", "[") or self._before_tag.stopped:
            return ""
        return self._show(self._before_tag.feed(self._text[self._fed() :]))

    def _fed(self) -> int:
        return self._shown + len(self._before_tag.held)

    def _show(self, text: str) -> str:
        self._shown += len(text)
        return text

    def end(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that was not passed on, and the calls."""
        content, calls = self._text, ()
        if self.names:
            content, calls = read_calls(self._text, python_tag=self.python_tag, names=self.names)
        return content[self._shown :], calls


@dataclass(kw_only=True)
class Writer:
    """Objects of one answer: they share an id, a time, a model and the counts of tokens."""

    model: str
    chat: bool
    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
        }  # fmt: skip

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "usage": self.usage(),
        }

    def chunk(self, choice: dict[str, Any] | None, *, usage: bool = False) -> str:
        """A server-sent event. Without a choice it is the last one, with the usage."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        head["choices"] = [] if choice is None else [choice]
        if usage:  # asked for: null until the end
            head["usage"] = self.usage() if choice is None else None
        return event(head)

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, chosen: Sequence[Chosen], offset: int = 0) -> dict[str, Any] | None:
        """Log-probabilities of these tokens in the endpoint's form; None where none were asked for.

        offset: characters of the text before them.
        """
        told = [c for c in chosen if c.logprob is not None and not (c.finish == "stop" and c.id in self.stop_ids)]
        if not told and (not chosen or chosen[0].logprob is None):
            return None
        if self.chat:
            content = [
                self._entry(c.id, c.logprob) | {"top_logprobs": [self._entry(i, value) for i, value in c.top]}
                for c in told
            ]
            return {"content": content, "refusal": None}
        offsets, tokens = [], []
        for c in told:
            offsets.append(offset)
            tokens.append(self._name(c.id))
            offset += len(tokens[-1])
        tops = [{self._name(i): _finite(value) for i, value in c.top} for c in told]
        values = [_finite(c.logprob) for c in told]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._name(token),
            "bytes": list(token_bytes(self.tokenizer, token)),
            "logprob": _finite(logprob),
        }


def _finite(value: float | None) -> float:
    return LEAST_LOGPROB if value is None or value < LEAST_LOGPROB else value


def event(data: Any) -> str:
    """A server-sent event; ASCII, so that no line break inside of text ends it early."""
    return f"data: {json.dumps(data)}\n\n"


def tool_calls(calls: Sequence[ToolCall], *, indexed: bool = False) -> list[dict[str, Any]]:
    """Calls in the form of the API; with their number, as in chunks, if indexed."""
    out = []
    for i, call in enumerate(calls):
        function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
        entry = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        out.append({"index": i} | entry if indexed else entry)
    return out

"""Dialogues and preferences out of JSON-lines files, as TRL takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sidlm.data.readers import read_lines
from sidlm.errors import SidError

Message = dict[str, Any]


def read_chats(path: str | Path, limit: int | None = None) -> list[dict[str, list[Message]]]:
    """[{"messages"}] of the lines of a .jsonl, .jsonl.zst or .jsonl.gz file, at most ``limit`` of them.

    A line is {messages: [{role, content}, ...]}, {instruction, output} or {prompt, completion} with texts.
    Raises SidError naming the file and the line of a malformed one, and for a file without any.
    """
    return _read(path, limit, _chat)


def read_preferences(path: str | Path, limit: int | None = None) -> list[dict[str, list[Message]]]:
    """[{"prompt", "chosen", "rejected"}], lists of messages, of lines {prompt, chosen, rejected}: texts or messages.

    Raises SidError as `read_chats` does.
    """
    return _read(path, limit, _preference)


def _read(path: str | Path, limit: int | None, parse: Callable[[Any], dict]) -> list[dict]:
    path = Path(path)
    if not path.is_file():
        raise SidError(f"no such file: {path}")
    found = []
    for where, line in _lines(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            found.append(parse(json.loads(line)))
        except json.JSONDecodeError as error:
            raise SidError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise SidError(f"{where}: not UTF-8 text: {error.reason}") from error
        except ValueError as error:
            raise SidError(f"{where}: {error}") from error
    if not found:
        raise SidError(f"{path}: nothing in it")
    return found


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in read_lines(path):
        if line.strip():
            yield f"{path}:{number}", line


def _chat(item: Any) -> dict[str, list[Message]]:
    if not isinstance(item, dict):
        raise ValueError(f"a line must be a JSON object, got {type(item).__name__}")
    if "messages" in item:
        messages = _messages(item["messages"], "messages", "user")
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("'messages' has none of the assistant's: there is nothing to learn")
        return {"messages": messages}
    for ask, answer in (("instruction", "output"), ("prompt", "completion")):
        if ask in item and answer in item:
            return {"messages": [*_messages(item[ask], ask, "user"), *_messages(item[answer], answer, "assistant")]}
    raise ValueError(_needs("messages, or instruction and output, or prompt and completion", item))


def _preference(item: Any) -> dict[str, list[Message]]:
    if not isinstance(item, dict) or not {"prompt", "chosen", "rejected"} <= set(item):
        raise ValueError(_needs("prompt, chosen and rejected", item))
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: _messages(item[key], key, role) for key, role in roles.items()}


def _messages(value: Any, key: str, role: str) -> list[Message]:
    """A text as one message of ``role``, or a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} must be a text or a list of messages, got {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{key!r}: a message must be an object with a role, got {json.dumps(message)[:80]}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"{key!r}: a message of the {message['role']} has no text in 'content'")
    return value


def _needs(keys: str, item: Any) -> str:
    has = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
    return f"needs the keys {keys}; it has {has or 'none'}"

"""Tool calls as Llama 3 models write them (arXiv 2407.21783, section 4.3.5), to text and back.

Built-in tools are called as ``brave_search.call(query="...")``, the interpreter by its code alone. Tools of one's own
are called in one of three formats:

    json           {"type": "function", "name": "f", "parameters": {"x": 1}}
    function_tag   <function=f>{"x": 1}</function>
    python_list    [f(x=1), g(y="a")]

What a model writes is data: it is parsed, never evaluated, and what is no call in its whole length is text.
"""

import ast
import json
import keyword
import math
import re
import unicodedata
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidlm.data.chat_template import BUILTIN_TOOLS, TOOLS_INTRODUCTION
from sidlm.data.tokenizer import clean
from sidlm.errors import SidError

TOOL_FORMATS = ("json", "function_tag", "python_list")
INTERPRETER = "code_interpreter"

_INTRODUCTIONS = {
    "json": TOOLS_INTRODUCTION,
    "function_tag": (
        "You can call these functions. To call one, reply with nothing but its name and its parameters as a JSON "
        'object, on one line: <function=NAME>{"PARAMETER": VALUE}</function>.\n\n'
    ),
    "python_list": (
        "You can call these functions. To call some, reply with nothing but a Python list of calls with keyword "
        "arguments: [NAME(PARAMETER=VALUE), NAME(PARAMETER=VALUE)].\n\n"
    ),
}
_BUILTIN = re.compile(r'\s*(\w+)\.call\(query="(.*)"\)\s*', re.DOTALL)
_TAG = re.compile(r"<function=([^<>{}]+)>\s*")
_MAX_PYTHON = 100_000  # characters of a list of calls; the parser's memory is a multiple of them


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a tool. The built-in ones take {"query": text}, the interpreter {"code": text}."""

    name: str
    arguments: Mapping[str, Any]


def check_format(tool_format: str) -> None:
    if tool_format not in TOOL_FORMATS:
        raise ValueError(f"tool_format must be one of {TOOL_FORMATS}, got {tool_format!r}")


def write_calls(calls: Sequence[ToolCall], tool_format: str) -> list[str]:
    """The text of the calls, in pieces that are encoded one by one.

    The bytes are those of Meta's reference wherever that can be read back; a Python list that it writes with unescaped
    quotes, or with ``=`` inside of a dictionary, is valid Python here.
    Raises SidError for a call that the format cannot hold.
    """
    own = [call for call in calls if call.name not in (*BUILTIN_TOOLS, INTERPRETER)]
    if tool_format == "python_list" and len(own) == len(calls) > 0:
        return [f"[{', '.join(map(_python_call, calls))}]"]
    return [_write(call, tool_format) for call in calls]


def _write(call: ToolCall, tool_format: str) -> str:
    if call.name in BUILTIN_TOOLS:
        return f'{call.name}.call(query="{_only(call, "query")}")'
    if call.name == INTERPRETER:
        return _only(call, "code")
    if tool_format == "python_list":
        return f"[{_python_call(call)}]"
    try:
        if tool_format == "json":
            named = {"type": "function", "name": call.name, "parameters": dict(call.arguments)}
            return json.dumps(named, allow_nan=False)
        if not _TAG.fullmatch(f"<function={call.name}>"):
            raise SidError(f"a function tag cannot hold the name {call.name!r}")
        return f"<function={call.name}>{json.dumps(dict(call.arguments), allow_nan=False)}</function>"
    except (TypeError, ValueError, RecursionError) as error:
        raise SidError(f"arguments of the call of {call.name!r} have no JSON form: {error}") from error


def _only(call: ToolCall, name: str) -> str:
    value = call.arguments.get(name)
    if set(call.arguments) != {name} or not isinstance(value, str):
        raise SidError(f"a call of {call.name} takes one text, {name!r}, got {dict(call.arguments)!r}")
    return value


def _python_call(call: ToolCall) -> str:
    if not all(map(_python_name, call.name.split("."))):
        raise SidError(f"a Python list cannot hold a call of {call.name!r}: not the name of a function")
    named = {k: v for k, v in call.arguments.items() if _python_name(k)}
    words = [f"{name}={_python_value(value)}" for name, value in named.items()]
    others = {k: v for k, v in call.arguments.items() if k not in named}
    if others:
        words.append(f"**{_python_value(others)}")
    return f"{call.name}({', '.join(words)})"


def _python_name(text: str) -> bool:
    """Whether Python reads it as a name, and as this one: it brings names to the normal form NFKC."""
    return text.isidentifier() and not keyword.iskeyword(text) and unicodedata.is_normalized("NFKC", text)


def _python_value(value: Any) -> str:
    if isinstance(value, str):
        plain = value.isprintable() and not set(value) & {'"', "\\"}
        return f'"{value}"' if plain else repr(value)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_python_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python_value(k)}: {_python_value(v)}" for k, v in value.items()) + "}"
    raise SidError(f"a Python list of calls cannot hold {value!r}")


def read_calls(
    text: str, *, python_tag: bool = False, names: Collection[str] | None = None
) -> tuple[str, tuple[ToolCall, ...]]:
    """What a model wrote as (text, calls): one of the two is empty, but for text before a function tag.

    python_tag: whether it wrote the tag first; then what is no other call is code for the interpreter.
    names: tools that may be called; a call of any other is text. None: all.
    """
    content, calls = text, ()
    for read in (_read_tags, _read_json, _read_python, _read_builtin):
        found = read(text)
        if found is not None:
            content, calls = found
            break
    if not calls and python_tag:
        content, calls = "", (ToolCall(name=INTERPRETER, arguments={"code": text}),)
    if names is not None and any(call.name not in names for call in calls):
        return text, ()
    return content, calls


Found = tuple[str, tuple[ToolCall, ...]]


def _read_tags(text: str) -> Found | None:
    calls, at = [], text.find("<function=")
    content = text[: max(at, 0)]
    while 0 <= at < len(text):
        tag = _TAG.match(text, at)
        parsed = _json_at(text, tag.end()) if tag else None
        if tag is None or parsed is None or not isinstance(parsed[0], dict):
            return None
        calls.append(ToolCall(name=clean(tag[1]), arguments=parsed[0]))
        rest = text[parsed[1] :].lstrip()
        rest = rest.removeprefix("</function>").lstrip()
        at = len(text) - len(rest)
    return (content.rstrip(), tuple(calls)) if calls else None


def _read_json(text: str) -> Found | None:
    calls, at = [], len(text) - len(text.lstrip())
    while at < len(text):
        parsed = _json_at(text, at) if text[at] == "{" else None
        call = _named(parsed[0]) if parsed else None
        if parsed is None or call is None:
            return None
        calls.append(call)
        rest = text[parsed[1] :].lstrip(" \t\r\n;")
        at = len(text) - len(rest)
    return ("", tuple(calls)) if calls else None


def _named(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("parameters", value.get("arguments"))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name=clean(name), arguments=arguments)


def _json_at(text: str, at: int) -> tuple[Any, int] | None:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _read_python(text: str) -> Found | None:
    if not text.lstrip().startswith("[") or len(text) > _MAX_PYTHON:
        return None
    try:
        with warnings.catch_warnings():  # Python's remarks on the style of a model
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
        calls = [_python_node(node) for node in tree.elts] if isinstance(tree, ast.List) else []
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return ("", tuple(calls)) if calls else None


def _python_node(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    arguments: dict[str, Any] = {}
    for word in node.keywords:
        value = ast.literal_eval(word.value)
        arguments |= value if word.arg is None else {word.arg: value}
    json.dumps(arguments, allow_nan=False)  # a set or a complex number is no argument of a tool
    return ToolCall(name=_dotted(node.func), arguments=arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("not the name of a function")


def _read_builtin(text: str) -> Found | None:
    match = _BUILTIN.fullmatch(text)
    if match is None or match[1] not in BUILTIN_TOOLS:
        return None
    return "", (ToolCall(name=match[1], arguments={"query": match[2]}),)


def tools_text(tools: Sequence[Mapping[str, Any]], tool_format: str = "json") -> str:
    """What the system message says of tools: how to call them, then each as JSON on a line of its own.

    tools: functions as {"name", "description", "parameters": JSON schema}, or such ones inside {"function": ...}.
    """
    check_format(tool_format)
    functions = [tool.get("function", tool) for tool in tools]
    for function in functions:
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise SidError(f"a tool needs a name, got {function!r}")
    return _INTRODUCTIONS[tool_format] + "".join(json.dumps(function) + "\n" for function in functions)

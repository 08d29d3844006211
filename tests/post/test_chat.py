"""The chat format against Meta's reference (package llama-models), and what the reference cannot say."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidlm.data.tokenizer import Tokenizer
from sidlm.errors import SidError
from sidlm.post.chat import ChatFormat, Message, message_of, with_tools
from sidlm.post.tools import ToolCall

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
SPELLED = st.sampled_from(
    [
        "<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n",
        "<|python_tag|>",
        "<|begin_of_text|>",
        "<|eom_id|>",
    ]
)
HOSTILE = st.lists(st.one_of(TEXT, SPELLED, st.just("<|"), st.just("\ufdd0")), max_size=5).map("".join)
# what the reference writes so that it can be read back: it does not escape text in a Python list
PLAIN = st.text(st.characters(categories=("L", "N", "Zs", "P"), exclude_characters='"\\'), max_size=20).filter(
    str.isprintable
)
BUILTIN = st.sampled_from(["brave_search", "wolfram_alpha"])
NAME = st.sampled_from(["get_weather", "f", "trending_songs"])
FLAT = st.one_of(PLAIN, st.integers(-(10**6), 10**6), st.booleans(), st.none(), st.floats(allow_nan=False, width=16))
ARGUMENTS = st.dictionaries(st.sampled_from(["n", "genre", "city"]), st.one_of(FLAT, st.lists(FLAT, max_size=3)))
ARGUMENTS = ARGUMENTS.filter(lambda values: "inf" not in str(values))
CALL = st.one_of(
    st.builds(lambda n, a: ToolCall(name=n, arguments=a), NAME, ARGUMENTS),
    st.builds(lambda n, q: ToolCall(name=n, arguments={"query": q}), BUILTIN, HOSTILE),
    st.builds(lambda code: ToolCall(name="code_interpreter", arguments={"code": code}), HOSTILE),
)  # fmt: skip
MESSAGE = st.one_of(
    st.builds(lambda r, c: Message(role=r, content=c), st.sampled_from(["system", "user", "ipython"]), HOSTILE),
    st.builds(
        lambda content, call, end: Message(role="assistant", content=content, tool_calls=call, end=end),
        HOSTILE, st.one_of(st.just(()), CALL.map(lambda call: (call,))), st.sampled_from(["eot", "eom"]),
    ),
)  # fmt: skip


class Adapter:
    """This library's tokenizer as the reference wants one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_tokens = tokenizer.special_ids | {"<|image|>": -1}

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        assert not bos and not eos
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def reference_message(message: Message):
    datatypes = pytest.importorskip("llama_models.datatypes")
    return datatypes.RawMessage(
        role="tool" if message.role == "ipython" else message.role,
        content=message.content,
        stop_reason=datatypes.StopReason("end_of_message" if message.end == "eom" else "end_of_turn"),
        tool_calls=[
            datatypes.ToolCall(call_id="1", tool_name=call.name, arguments=dict(call.arguments))
            for call in message.tool_calls
        ],
    )


def reference_ids(reference, messages: list[Message], tool_format: str) -> list[int]:
    from llama_models.datatypes import ToolPromptFormat

    return reference.encode_dialog_prompt(list(map(reference_message, messages)), ToolPromptFormat(tool_format)).tokens


@pytest.fixture(scope="module")
def reference(tokenizer):
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    return chat_format.ChatFormat(Adapter(tokenizer))


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_dialogues_are_the_references_token_for_token(tokenizer, reference, tool_format):
    chat = ChatFormat(tokenizer, tool_format=tool_format)

    @given(st.lists(MESSAGE, max_size=4))
    @settings(max_examples=150, deadline=None)
    def same(messages):
        assert chat.encode(messages) == reference_ids(reference, messages, tool_format)

    same()


def test_with_llama_3s_own_tokenizer(tmp_path):
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    from llama_models.llama3.tokenizer import Tokenizer as Theirs

    chat = ChatFormat(Tokenizer.load(Path(chat_format.__file__).parent / "tokenizer.model"))
    reference = chat_format.ChatFormat(Theirs.get_instance())
    assert list(chat.stop_ids) == Theirs.get_instance().stop_tokens

    @given(st.lists(MESSAGE, max_size=4))
    @settings(max_examples=50, deadline=None)
    def same(messages):
        assert chat.encode(messages) == reference_ids(reference, messages, "json")

    same()


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_answers_are_parsed_as_by_the_reference(tokenizer, reference, tool_format):
    """Where it can parse them: it takes ' for " in tags and ends their JSON at the first brace."""
    from llama_models.datatypes import StopReason

    chat = ChatFormat(tokenizer, tool_format=tool_format)

    @given(
        st.one_of(
            st.builds(lambda c, e: Message(role="assistant", content=c, end=e), PLAIN, st.sampled_from(["eot", "eom"])),
            CALL.filter(lambda call: not set("'\"{}") & set(str(list(call.arguments.values())).replace("'", "")))
            .filter(lambda call: not any("'" in str(value) for value in call.arguments.values()))
            .filter(lambda call: not any("<|" in str(value) for value in call.arguments.values()))
            .map(lambda call: Message(role="assistant", tool_calls=(call,))),
        )
    )
    @settings(max_examples=150, deadline=None)
    def same(message):
        ids = chat.encode([message], generation_prompt=False)[1:]
        mine, theirs = chat.parse(ids), reference.decode_assistant_message(ids, StopReason.out_of_tokens)
        found = [(call.name, dict(call.arguments)) for call in mine.tool_calls]
        assert found == [(getattr(c.tool_name, "value", c.tool_name), c.arguments) for c in theirs.tool_calls]
        assert mine.content.strip(" ") == theirs.content.strip(" ")  # it strips some spaces
        assert mine.end == ("eom" if theirs.stop_reason == StopReason.end_of_message else "eot")

    same()


VALUES = st.recursive(
    st.one_of(HOSTILE, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(HOSTILE, inner, max_size=3)),
    max_leaves=8,
)


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_calls_with_any_arguments_come_back(tokenizer, tool_format):
    chat = ChatFormat(tokenizer, tool_format=tool_format)
    calls = st.builds(lambda n, a: ToolCall(name=n, arguments=a), NAME, st.dictionaries(HOSTILE, VALUES, max_size=3))

    @given(st.lists(calls, min_size=1, max_size=3).map(tuple))
    @example((ToolCall(name="f", arguments={"\ufb00": 1, "ff": 2}),))  # one name to Python, which reads them in NFKC
    @settings(max_examples=150, deadline=None)
    def back(calls):
        message = Message(role="assistant", tool_calls=calls, python_tag=False)
        ids = chat.encode([message], generation_prompt=False)[1:]
        assert chat.parse(ids) == message

    back()


@given(HOSTILE.map(lambda s: s.replace("\r", "")), st.sampled_from(["eot", "eom"]))
@settings(max_examples=150, deadline=None)
def test_text_and_built_in_calls_come_back(tokenizer, text, end):
    chat = ChatFormat(tokenizer)
    for call in (
        ToolCall(name="brave_search", arguments={"query": text}),
        ToolCall(name="code_interpreter", arguments={"code": f"# {text}"}),
    ):
        message = Message(role="assistant", tool_calls=(call,), python_tag=True, end=end)
        assert chat.parse(chat.encode([message], generation_prompt=False)[1:]) == message
    message = Message(role="assistant", content=f"a {text}", python_tag=False, end=end)
    assert chat.parse(chat.encode([message], generation_prompt=False)[1:]) == message


@given(st.lists(MESSAGE, max_size=4))
@settings(max_examples=150, deadline=None)
def test_content_never_becomes_a_control_token(tokenizer, messages):
    """The control tokens of a dialogue are those of its structure, in order, whatever its messages spell."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    ids, targets = ChatFormat(tokenizer).encode_with_targets(messages)
    expected = ["<|begin_of_text|>"]
    for message in messages:
        expected += ["<|start_header_id|>", "<|end_header_id|>"]
        if message.tool_calls and message.tool_calls[0].name == "code_interpreter":
            expected.append("<|python_tag|>")
        expected.append(f"<|{message.end}_id|>")
    assert [names[i] for i in ids if i in names] == expected
    assert len(ids) == len(targets)


def test_targets_are_what_the_assistant_writes(tokenizer):
    chat = ChatFormat(tokenizer)
    dialogue = [Message(role="user", content="the cat"), Message(role="assistant", content="a mat")]
    ids, targets = chat.encode_with_targets(dialogue)
    written = [i for i, target in zip(ids, targets, strict=True) if target]
    assert tokenizer.decode(written) == "a mat<|eot_id|>"
    assert chat.encode(dialogue) == ids + chat.header("assistant")


def test_parse_tells_control_tokens_by_id(tokenizer):
    chat = ChatFormat(tokenizer)
    spelled = tokenizer.encode("<|python_tag|>f()<|eot_id|>")
    assert chat.parse(spelled) == Message(role="assistant", content="<|python_tag|>f()<|eot_id|>", python_tag=False)
    tagged = [tokenizer.special_ids["<|python_tag|>"], *tokenizer.encode("f()")]
    call = ToolCall(name="code_interpreter", arguments={"code": "f()"})
    assert chat.parse(tagged) == Message(role="assistant", tool_calls=(call,), python_tag=True)
    assert chat.parse([]) == Message(role="assistant", python_tag=False)


def test_messages_of_the_openai_form():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert message_of({"role": "assistant", "content": None, "tool_calls": [call]}) == Message(
        role="assistant", tool_calls=(ToolCall(name="f", arguments={"x": 1}),)
    )
    assert message_of({"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}) == Message(
        role="ipython", content="4"
    )
    search = {"function": {"name": "brave_search", "arguments": {"query": "q"}}}
    message = message_of({"role": "assistant", "tool_calls": [search]})
    assert message.python_tag and message.end == "eom"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"content": "x"}, "a message needs a role, got None"),
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'; there are system, user"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part of type 'image_url'"),
        ({"role": "user", "tool_calls": [{"function": {"name": "f"}}]}, "only an assistant calls tools"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call needs a name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "are not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}, "must be an object"),
        ({"role": "assistant", "content": "x", "end": "eos"}, "ends in eot or eom, got 'eos'"),
    ],
)
def test_bad_messages_are_named(fields, error):
    with pytest.raises(SidError, match=error):
        message_of(fields)


def test_a_tokenizer_without_control_tokens_has_no_chat_format():
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = Tokenizer(backend, bos="</s>", eos="</s>", pad="</s>")
    assert tokenizer.chat_template is None
    with pytest.raises(SidError, match=r"has no <\|begin_of_text\|>: it has no chat format"):
        ChatFormat(tokenizer)


def test_tools_go_into_the_system_message(tokenizer):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    alone, both = (
        with_tools(messages, [tool])[0]
        for messages in ([Message(role="user")], [Message(role="system", content="Be kind."), Message(role="user")])
    )
    assert alone.role == "system" and json.loads(alone.content.splitlines()[-1]) == tool["function"]
    assert both.content == f"{alone.content}\nBe kind."
    assert with_tools([Message(role="user")], []) == [Message(role="user")]


def documented():
    """(prompt, response) of each example in Meta's description of the format."""
    package = pytest.importorskip("llama_models")
    text = (Path(package.__file__).parent / "llama3_1" / "prompt_format.md").read_text()
    blocks = re.findall(r"##### (Input Prompt|Model Response) Format\n```\n(.*?)\n?```\n", text, flags=re.DOTALL)
    pairs = [(a[1], b[1]) for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
    assert [kind for kind, _ in blocks] == ["Input Prompt", "Model Response"] * len(pairs)
    return [pair for pair in pairs if "<|start_header_id|>" in pair[0]]


MESSAGES = re.compile(
    r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(<\|python_tag\|>)?(.*?)<\|(eot|eom)_id\|>", re.DOTALL
)


def test_the_examples_of_the_documentation(tokenizer):
    chat, examples = ChatFormat(tokenizer), documented()
    assert len(examples) >= 6
    calls = []
    for prompt, response in examples:
        messages = [
            Message(role=role, content=content, python_tag=bool(tag), end=end)
            for role, tag, content, end in MESSAGES.findall(prompt)
        ]
        assert tokenizer.decode(chat.encode(messages)).rstrip("\n") == prompt.rstrip("\n")
        tag = response.startswith("<|python_tag|>")
        body, _, end = response.removeprefix("<|python_tag|>").rpartition("<|")
        ids = [tokenizer.special_ids["<|python_tag|>"]] * tag + tokenizer.encode(body)
        answer = chat.parse([*ids, tokenizer.special_ids[f"<|{end}"]])
        assert answer.end == end[:3] and bool(answer.content) != bool(answer.tool_calls)
        calls += [(call.name, dict(call.arguments)) for call in answer.tool_calls]
    assert ("brave_search", {"query": "latest price of 1oz gold"}) in calls
    assert ("trending_songs", {"n": "10", "genre": "all"}) in calls and ("trending_songs", {"n": 10}) in calls
    assert any(name == "code_interpreter" and "is_prime(7)" in given["code"] for name, given in calls)

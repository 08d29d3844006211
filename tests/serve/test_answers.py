from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.post.tools import ToolCall, read_calls
from sidlm.serve.answers import CallReader, event, tool_calls
from sidlm.serve.text import token_bytes

PARTS = ["<function=f>", '{"x": 1}', "</function>", "text", " ", "<", "<function", '{"name": "f", "parameters": {}}',
         "[f(x=1)]", "[g()]", "\n", '{"a"', "f", "é"]  # fmt: skip
CALL = '{"type": "function", "name": "f", "parameters": {"x": 1}}'


@given(st.lists(st.sampled_from(PARTS), max_size=7).map("".join), st.integers(1, 9), st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_give_what_the_whole_text_gives(text, step, tag):
    """Shown text and calls do not depend on how the text is cut; what is shown is never taken back."""
    reader = CallReader(["f"])
    reader.python_tag = tag
    shown = "".join(reader.feed(text[i : i + step]) for i in range(0, len(text), step))
    rest, calls = reader.end()
    content, expected = read_calls(text, python_tag=tag, names=["f"])
    assert calls == expected
    assert (shown + rest).rstrip() == content.rstrip() and text.startswith(shown)
    if not calls:
        assert shown + rest == text


@pytest.mark.parametrize("text", [CALL, "[f(x=1)]", '<function=f>{"x": 1}</function>', f" \n{CALL}"])
def test_no_part_of_a_call_is_shown(text):
    reader = CallReader(["f"])
    assert "".join(map(reader.feed, text)).strip() == ""
    assert reader.end() == ("", (ToolCall(name="f", arguments={"x": 1}),))


def test_text_is_shown_at_once():
    reader = CallReader(["f"])
    shown = map(reader.feed, ("a", "b <", "c", ' <function=f>{"x"', ": 1}"))
    assert list(shown) == ["a", "b ", "<c", " ", ""]
    assert reader.end()[1] == (ToolCall(name="f", arguments={"x": 1}),)


def test_without_tools_everything_is_text():
    reader = CallReader([])
    reader.python_tag = True
    assert reader.feed(CALL) == CALL and reader.end() == ("", ())


def test_calls_of_other_tools_are_text():
    reader = CallReader(["g"])
    assert reader.feed(CALL) == "" and reader.end() == (CALL, ())


def test_calls_have_ids_of_their_own():
    first, second = tool_calls([ToolCall(name="f", arguments={"x": "é"})] * 2, indexed=True)
    assert first["id"] != second["id"] and (first["index"], second["index"]) == (0, 1)
    assert json.loads(first["function"]["arguments"]) == {"x": "é"}


def test_events_are_one_line():
    assert event({"a": "b\n\ndata: [DONE]\u2028"}).count("\n") == 2


def test_bytes_of_tokens(tokenizer):
    text = "naïve 数学 🎉\n"
    ids = tokenizer.encode(text)
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == text
    assert token_bytes(tokenizer, tokenizer.bos_id) == b"<|begin_of_text|>"

from __future__ import annotations

import json

import pytest
import zstandard

from sidlm.errors import SidError
from sidlm.post.data import read_chats, read_preferences

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def write(path, lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    return path


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.zst"])
def test_every_form_of_a_chat(tmp_path, name):
    forms = [
        {"messages": [USER, ASSISTANT]},
        {"instruction": "a", "output": "b", "generator": "ignored"},
        "",
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ]
    path = write(tmp_path / name, forms)
    assert read_chats(path) == [{"messages": [USER, ASSISTANT]}] * 4
    assert len(read_chats(path, 2)) == 2


def test_every_form_of_a_preference(tmp_path):
    forms = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "c"}], "annotator": "x"},
    ]
    want = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "c"}]}
    assert read_preferences(write(tmp_path / "p.jsonl", forms)) == [want, want]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object, got list"),
        ({"text": "a"}, "needs the keys messages, or .*; it has text"),
        ({"messages": []}, "'messages' must be a text or a list of messages"),
        ({"messages": [USER]}, "none of the assistant's"),
        ({"messages": [USER, {"content": "b"}]}, "must be an object with a role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "the assistant has no text"),
        ({"instruction": "a", "output": 3}, "'output' must be a text or a list of messages, got int"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", [{"messages": [USER, ASSISTANT]}, line])
    with pytest.raises(SidError, match=message) as error:
        read_chats(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_files_without_anything(tmp_path):
    with pytest.raises(SidError, match="no such file"):
        read_chats(tmp_path / "absent.jsonl")
    with pytest.raises(SidError, match="nothing in it"):
        read_preferences(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(SidError, match=r"bad\.jsonl:1: needs the keys prompt, chosen and rejected; it has prompt"):
        read_preferences(write(tmp_path / "bad.jsonl", [{"prompt": "a"}]))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(SidError, match=r"latin\.jsonl:1: not UTF-8 text"):
        read_chats(latin)

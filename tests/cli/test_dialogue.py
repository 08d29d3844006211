"""``sid chat`` with a model that has a chat format. The model says what the test makes it say."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest

from sidlm.cli import dialogue
from sidlm.cli.generate import Completion
from sidlm.data.tokenizer import Tokenizer
from sidlm.post.chat import ChatFormat

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '{"type": "function", "name": "weather", "parameters": {"city": "Ulm"}}'


@pytest.fixture(scope="module")
def roomy(demo_run, tmp_path_factory):
    """The model with a context that holds the description of a tool."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(demo_run / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def talk(sid, demo_run, monkeypatch):
    """Runs a chat of these lines; gives status, output and the prompts as text.

    answers: what the model writes, in order, "^C" for an interrupt after the word "half"; None lets it speak itself.
    """

    def run(lines, answers=None, *options, model=demo_run, chat="--chat"):
        waiting, prompts = iter(lines), []

        def answer(prompt=""):
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer)
        real, said = dialogue.complete, iter(answers or ())

        def complete(model, tokenizer, tokens, write, **rest):
            prompts.append(tokenizer.decode(tokens))
            assert len(tokens) <= model.config.max_position_embeddings - 6 - 1
            if answers is None:
                return real(model, tokenizer, tokens, write, **rest)
            text = next(said)
            if text == "^C":
                write("half")
                raise KeyboardInterrupt
            for letter in text:
                write(letter)
            return Completion([*tokenizer.encode(text), tokenizer.special_ids["<|eot_id|>"]], text)

        with monkeypatch.context() as patch:
            patch.setattr(dialogue, "complete", complete)
            words = (chat,) if chat else ()
            status, out, err = sid("chat", model, *words, "--max-new-tokens", 6, "--greedy", *options)
        return status, out, err, prompts

    return run


def test_roles_and_history(talk):
    lines = ["one <|eot_id|>", "/system Be kind.", "two", "/history", "/system", "three", "/quit"]
    status, out, _, prompts = talk(lines, ["first", "second", "third"], "--system", "Be brief.")
    assert status == 0
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    user = "<|start_header_id|>user<|end_header_id|>\n\none <|eot_id|><|eot_id|>"
    asked = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert prompts[0] == head + user + asked
    assert "Be kind.<|eot_id|>" in prompts[1] and f"{user}{asked}first<|eot_id|>" in prompts[1]
    assert "system" not in prompts[2] and prompts[2].endswith(asked)
    assert "first\n" in out and "system: Be kind.\nuser: one <|eot_id|>\nassistant: first\nuser: two\n" in out


def test_undo_and_reset(talk):
    lines = ["one", "two", "/undo", "three", "/reset", "four", "/undo", "/undo"]
    status, out, _, prompts = talk(lines, ["1", "2", "3", "4"])
    assert status == 0 and "two" not in prompts[2] and "one" in prompts[2] and "one" not in prompts[3]
    assert out.count("(taken back)") == 2 and "(there is nothing to take back)" in out and "(forgotten)" in out


@pytest.mark.parametrize("text", [CALL, '<function=weather>{"city": "Ulm"}</function>', '[weather(city="Ulm")]'])
def test_calls_are_shown_and_answered(talk, tmp_path, text, roomy):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    status, out, _, prompts = talk(
        ["hot?", "/tool 31 degrees", "/history"], [text, "Yes."], "--tools", file, model=roomy
    )
    assert status == 0 and '-> weather(city="Ulm")' in out and text not in out
    assert '"name": "weather"' in prompts[0]
    assert CALL in prompts[1] and "ipython<|end_header_id|>\n\n31 degrees<|eot_id|>" in prompts[1]
    assert 'assistant:  -> weather(city="Ulm")\nipython: 31 degrees\nassistant: Yes.' in out


def test_without_tools_a_call_is_text(talk):
    _, out, _, _ = talk(["x"], [CALL])
    assert CALL in out and "->" not in out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_seen(talk):
    status, out, err, prompts = talk(["one", "two"], ["^C", "2"])
    assert status == 0 and "half" in out and "(stopped)" in err
    assert "\n\nhalf<|eot_id|>" in prompts[1]


def test_a_long_dialogue_loses_its_oldest_messages_but_no_system_message(talk):
    lines = ["FIRST", *["the cat sees a small old red blue house and then"] * 20]
    status, _, _, prompts = talk(lines, ["yes"] * 21, "--system", "SYSTEM")
    assert status == 0 and "FIRST" in prompts[1] and "FIRST" not in prompts[-1]
    assert all("\n\nSYSTEM<|eot_id|><|start_header_id|>user" in prompt for prompt in prompts)


def test_a_message_that_is_too_long_ends_no_conversation(talk):
    status, _, err, prompts = talk(["x " * 300, "short"], ["yes"])
    assert status == 0 and "there is room for 249" in err and len(prompts) == 1 and "x x" not in prompts[0]


def test_commands(talk):
    status, out, _, prompts = talk(["/help", "/nothing", "", "/tool", "/quit", "never"])
    assert status == 0 and not prompts and "no command /nothing; there are /system, /tool," in out
    assert all(f"/{name}" in out for name in dialogue.COMMANDS)


def test_the_model_itself_answers(talk):
    status, out, _, prompts = talk(["The cat", "and"])
    assert status == 0 and len(prompts) == 2 and len(out) > 60


def test_a_model_that_ends_its_turns_is_spoken_to_in_its_format(talk, demo_run, tmp_path):
    model = tmp_path / "chatty"
    shutil.copytree(demo_run / "model", model)
    config = json.loads((model / "generation_config.json").read_text())
    tokenizer = Tokenizer.load(model)
    config["eos_token_id"] = [tokenizer.eos_id, tokenizer.special_ids["<|eot_id|>"]]
    (model / "generation_config.json").write_text(json.dumps(config))
    assert len(talk(["x"], ["y"], model=model, chat="")[3]) == 1
    assert not talk(["x"], ["y"], model=demo_run, chat="")[3]
    assert not talk(["x"], ["y"], model=model, chat="--plain")[3]
    assert set(ChatFormat(tokenizer).stop_ids) >= set(config["eos_token_id"])


def test_bad_files_and_options(fails, demo_run, tmp_path):
    file = tmp_path / "tools.json"
    for text, error in (("{", "is not JSON"), ("{}", "must hold a list of functions"), ('[{"a": 1}]', "needs a name")):
        file.write_text(text)
        assert error in fails("chat", demo_run, "--chat", "--tools", file)
    file.write_text("[]")
    assert "--system is for a chat: give --chat too" in fails("chat", demo_run, "--system", "x")
    assert "not allowed with" in fails("chat", demo_run, "--chat", "--plain")

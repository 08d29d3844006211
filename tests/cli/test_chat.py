from __future__ import annotations

import builtins

import pytest

from sidlm.cli import chat as chat_module


@pytest.fixture
def typed(monkeypatch):
    """Feeds lines to input(); an exception among them is raised, the end is Ctrl-D."""

    def feed(*lines):
        waiting = iter(lines)

        def answer(prompt=""):
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer)

    return feed


class Prompts(list):
    def __init__(self):
        self.lengths = []


@pytest.fixture
def prompts(monkeypatch):
    """What was given to the model, turn by turn."""
    seen = Prompts()
    real = chat_module.complete

    def complete(model, tokenizer, tokens, write, **options):
        seen.append(tokenizer.decode(tokens, skip_special=True))
        seen.lengths.append(len(tokens))
        return real(model, tokenizer, tokens, write, **options)

    monkeypatch.setattr(chat_module, "complete", complete)
    return seen


def chat(sid, demo_run, *options):
    return sid("chat", demo_run, "--max-new-tokens", 6, "--greedy", *options)


def test_history_grows_and_reset_forgets(sid, demo_run, typed, prompts):
    typed("The cat", "and then", "/reset", "The dog", "/quit", "never read")
    status, out, err = chat(sid, demo_run)
    assert status == 0 and not err
    assert prompts[0] == "The cat" and prompts[2] == "The dog" and len(prompts) == 3
    assert prompts[1].startswith("The cat") and prompts[1].endswith("\nand then")
    reply = prompts[1].removeprefix("The cat").removesuffix("\nand then")
    assert reply and reply in out and "(forgotten)" in out


def test_end_of_input_and_ctrl_c_at_the_prompt_end_it(sid, demo_run, typed):
    typed()
    assert chat(sid, demo_run)[0] == 0
    typed(KeyboardInterrupt())
    assert chat(sid, demo_run)[0] == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_loop(sid, demo_run, typed, monkeypatch, prompts):
    real = chat_module.complete

    def interrupted(model, tokenizer, tokens, write, **options):
        if len(prompts) == 0:
            prompts.append("interrupted")
            write(" half")
            raise KeyboardInterrupt
        return real(model, tokenizer, tokens, write, **options)

    monkeypatch.setattr(chat_module, "complete", interrupted)
    typed("The cat", "again")
    status, out, err = chat(sid, demo_run)
    assert status == 0 and " half" in out and "(stopped)" in err
    assert prompts[1] == "The cat half\nagain"


def test_unknown_slash_command_and_empty_line(sid, demo_run, typed, prompts):
    typed("/rest", "", "/quit")
    status, out, _ = chat(sid, demo_run)
    assert status == 0 and "no command /rest; there are /reset and /quit" in out and not prompts


def test_a_long_history_loses_its_beginning(sid, demo_run, typed, prompts):
    typed("FIRST", *["the cat sees a small old red blue house and then"] * 20)
    assert chat(sid, demo_run)[0] == 0
    assert prompts[1].startswith("FIRST") and not prompts[-1].startswith("FIRST")
    assert prompts.lengths[-1] == 256 - 6 and max(prompts.lengths) == 256 - 6


def test_no_room_for_a_prompt(fails, demo_run):
    assert "--max-new-tokens 256 leaves no room" in fails("chat", demo_run, "--max-new-tokens", 256)

"""``sid chat``: talk to a model in Llama 3's chat format, or continue text in a loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, load
from sidlm.cli.generate import add_sampling, complete, sampling, write_now
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM

HELP = "type text to continue; /reset forgets it all, /quit ends (as do Ctrl-D and Ctrl-C)"
COMMANDS = {"reset": "forgets all", "quit": "ends"}


def main(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "Talk to a model. One that was trained to chat is spoken to in Llama 3's chat format, with roles and tools;\n"
        "any other one continues text, and sees everything typed and generated so far. Ctrl-C stops an answer.",
        '  sid chat runs/demo --temperature 0.7\n  sid chat my-chat-model --system "Be brief." --tools tools.json',
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="chat format, whatever the model's settings say")
    how.add_argument("--plain", action="store_true", help="continue text, whatever they say")
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of functions that the model may ask you to call")
    parser.add_argument(
        "--tool-format", choices=("json", "function_tag", "python_list"), default="json", help="how it is asked to"
    )
    add_sampling(parser)
    args = parser.parse_args(argv)
    tools = _read_tools(args.tools) if args.tools else []

    model, tokenizer = load(args.model, args.device)
    room = model.config.max_position_embeddings - args.max_new_tokens - 1
    if room < 1:
        raise SidError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    if args.chat or (not args.plain and chats(model, tokenizer)):
        from sidlm.cli.dialogue import talk

        return talk(model, tokenizer, args, room, tools)
    if args.system or tools:
        raise SidError(f"{'--system' if args.system else '--tools'} is for a chat: give --chat too")
    return _continue(model, tokenizer, args, room)


def chats(model: SidForCausalLM, tokenizer: Tokenizer) -> bool:
    """Whether the model ends its turns: its generation config names <|eot_id|> among the ends of a text."""
    from sidlm.serve.decode import end_ids

    return tokenizer.special_ids.get("<|eot_id|>") in end_ids(model, tokenizer)


def read_line(commands: dict[str, str], prompt: str = "> ") -> tuple[str, str] | None:
    """(command, text) as typed, "" for no command; None at the end. An unknown command is told, and asked for anew."""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return None
        if not line.startswith("/"):
            return "", line
        if word[1:] in commands:
            return word[1:], rest.strip()
        names = [f"/{name}" for name in commands]
        print(f"no command {word}; there are {', '.join(names[:-1])} and {names[-1]}")


def _continue(model: SidForCausalLM, tokenizer: Tokenizer, args: Any, room: int) -> int:
    print(HELP)
    history: list[int] = []
    turn = 0
    while (typed := read_line(COMMANDS)) is not None:
        command, line = typed
        if command == "reset":
            history = []
            print("(forgotten)")
            continue
        # the oldest text goes first when the model's positions are full
        history = [*history, *tokenizer.encode("\n" + line if history else line)][-room:]
        if not history:
            continue
        said: list[str] = []
        try:
            done = complete(
                model, tokenizer, [tokenizer.bos_id, *history], both(said.append, write_now),
                sampling=sampling(args, turn=turn),
            )  # fmt: skip
            history += [token for token in done.ids if token != tokenizer.eos_id]
        except KeyboardInterrupt:
            # an interrupted reply stays in the history as far as it was seen
            history += tokenizer.encode("".join(said))
            print(" (stopped)", end="", file=sys.stderr)
        turn += 1
        print()
    return 0


def both(*writers: Callable[[str], Any]) -> Callable[[str], None]:
    """A writer to all of them."""

    def write(text: str) -> None:
        for writer in writers:
            writer(text)

    return write


def _read_tools(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        try:
            tools = json.load(file)
        except (ValueError, RecursionError) as error:
            raise SidError(f"{path} is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SidError(f"{path} must hold a list of functions")
    return tools

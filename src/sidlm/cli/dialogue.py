"""The loop of ``sid chat`` with a model that has a chat format: roles, tools, history."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from sidlm.cli.chat import both, read_line
from sidlm.cli.generate import complete, sampling, write_now
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.post.chat import Message

COMMANDS = {
    "system": "TEXT is the system message from now on; without TEXT there is none",
    "tool": "TEXT is the answer of a tool",
    "history": "shows the dialogue",
    "undo": "takes back the last answer and what it answered",
    "reset": "forgets the dialogue, but not the system message",
    "help": "shows this",
    "quit": "ends, as do Ctrl-D and Ctrl-C",
}


class Dialogue:
    """The messages so far, and the prompt that they make."""

    def __init__(self, tokenizer: Tokenizer, tools: list[dict[str, Any]], tool_format: str, system: str | None) -> None:
        from sidlm.post.chat import ChatFormat
        from sidlm.post.tools import BUILTIN_TOOLS, INTERPRETER, tools_text

        self.chat = ChatFormat(tokenizer, tool_format=tool_format)
        self.tools = tools
        self.system = system
        self.messages: list[Message] = []
        tools_text(tools, tool_format)  # refuses what is no tool before anything is typed
        self.names = (*(tool.get("function", tool)["name"] for tool in tools), *BUILTIN_TOOLS, INTERPRETER)

    def prompt(self, room: int) -> list[int]:
        """Token ids, at most `room`: the oldest messages go first when there are more. Raises SidError if none fits."""
        while True:
            ids = self.chat.encode(self._whole())
            if len(ids) <= room:
                return ids
            # what is left begins with what a user says: a tool's answer means nothing without its call
            later = next((i for i, m in enumerate(self.messages[1:], start=1) if m.role == "user"), None)
            if later is None:
                raise SidError(f"the message has {len(ids)} tokens with all around it, there is room for {room}")
            del self.messages[:later]

    def _whole(self) -> list[Message]:
        from sidlm.post.chat import Message, with_tools

        head = [] if not self.system else [Message(role="system", content=self.system)]
        return with_tools([*head, *self.messages], self.tools, tool_format=self.chat.tool_format)

    def undo(self) -> bool:
        """Take back messages up to and with the last one that was typed."""
        while self.messages:
            if self.messages.pop().role != "assistant":
                return True
        return False


def talk(model: SidForCausalLM, tokenizer: Tokenizer, args: Any, room: int, tools: list[dict[str, Any]]) -> int:
    """The loop. Returns the exit status."""
    from sidlm.post.chat import Message

    dialogue = Dialogue(tokenizer, tools, args.tool_format, args.system)
    print("say something; /help shows the commands, Ctrl-C stops an answer")
    turn = 0
    while (typed := read_line(COMMANDS)) is not None:
        command, text = typed
        if command in ("", "tool"):
            if not text:
                continue
            dialogue.messages.append(Message(role="ipython" if command else "user", content=text))
            try:
                _answer(model, tokenizer, dialogue, args, room, turn)
            except SidError as error:  # a message that is too long ends no conversation
                dialogue.undo()
                print(f"({error})", file=sys.stderr)
            turn += 1
        else:
            _obey(dialogue, command, text)
    return 0


def _obey(dialogue: Dialogue, command: str, text: str) -> None:
    if command == "system":
        dialogue.system = text or None
        print("(system message set)" if text else "(system message removed)")
    elif command == "reset":
        dialogue.messages = []
        print("(forgotten)")
    elif command == "undo":
        print("(taken back)" if dialogue.undo() else "(there is nothing to take back)")
    elif command == "history":
        if dialogue.system:
            print(f"system: {dialogue.system}")
        for message in dialogue.messages:
            calls = "".join(f" -> {_shown(call)}" for call in message.tool_calls)
            print(f"{message.role}: {message.content}{calls}")
    else:
        for name, about in COMMANDS.items():
            print(f"/{name:<8} {about}")


def _answer(model: SidForCausalLM, tokenizer: Tokenizer, dialogue: Dialogue, args: Any, room: int, turn: int) -> None:
    """Print the model's answer as it is made and add it to the dialogue; calls of tools are shown as such."""
    from sidlm.post.chat import Message
    from sidlm.serve.answers import CallReader

    reader, said = CallReader(dialogue.names if dialogue.tools else ()), []
    show = both(said.append, lambda piece: write_now(reader.feed(piece)))
    try:
        done = complete(
            model, tokenizer, dialogue.prompt(room), show,
            sampling=sampling(args, turn=turn), stop_ids=dialogue.chat.stop_ids,
        )  # fmt: skip
    except KeyboardInterrupt:
        # an interrupted answer stays in the history as far as it was seen
        dialogue.messages.append(Message(role="assistant", content="".join(said)))
        print(" (stopped)", file=sys.stderr)
        return
    message = dialogue.chat.parse(done.ids, names=reader.names)
    dialogue.messages.append(message)
    write_now("" if message.tool_calls else reader.end()[0])
    for call in message.tool_calls:
        print(f"-> {_shown(call)}")
    if message.tool_calls:
        print("(call it and give its answer: /tool TEXT)")
    else:
        print()


def _shown(call: Any) -> str:
    values = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({values})"

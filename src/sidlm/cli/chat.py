"""``sid chat``: continue text in a loop. A plain completion loop: base models have no chat format."""

from __future__ import annotations

import sys

from sidlm.cli.common import Parser, load
from sidlm.cli.generate import add_sampling, complete, sampling, write_now
from sidlm.errors import SidError

HELP = "type text to continue; /reset forgets it all, /quit ends (as do Ctrl-D and Ctrl-C)"


def main(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "Continue text in a loop: the model sees everything typed and generated so far. " + HELP + ".",
        "  sid chat runs/demo --temperature 0.7",
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    add_sampling(parser)
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model, args.device)
    import torch

    torch.manual_seed(args.seed)
    room = model.config.max_position_embeddings - args.max_new_tokens - 1
    if room < 1:
        raise SidError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    print(HELP)
    history: list[int] = []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line.strip() in ("/quit", "/exit"):
            return 0
        if line.strip() == "/reset":
            history = []
            print("(forgotten)")
            continue
        if line.startswith("/"):
            print(f"no command {line.split()[0]}; there are /reset and /quit")
            continue
        # the oldest text goes first when the model's positions are full
        history = [*history, *tokenizer.encode("\n" + line if history else line)][-room:]
        if not history:
            continue
        reply: list[str] = []

        def write(text: str, reply: list[str] = reply) -> None:
            reply.append(text)
            write_now(text)

        try:
            stream = complete(model, tokenizer, [tokenizer.bos_id, *history], write, **sampling(args))
            history += [token for token in stream.tokens if token != tokenizer.eos_id]
        except KeyboardInterrupt:
            # an interrupted reply stays in the history as far as it was seen
            history += tokenizer.encode("".join(reply))
            print(" (stopped)", end="", file=sys.stderr)
        print()

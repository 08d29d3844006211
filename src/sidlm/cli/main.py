"""``sid COMMAND ...``: finds the command, turns mistakes into one line and an exit status."""

import difflib
import importlib
import linecache
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sidlm import __version__
from sidlm.errors import SidError

# command -> (module, what it does); the modules are imported only when asked for, so that help is instant
COMMANDS = {
    "demo": ("sidlm.cli.demo", "train, evaluate and sample a tiny model here, in minutes, with no download"),
    "plan": ("sidlm.cli.plan", "memory, speed and the best mesh of a run on GPUs that need not be there"),
    "train": ("sidlm.cli.train", "train a model from a config and your own data"),
    "launch": ("sidlm.cli.launch", "train or extend in several processes, on one or many nodes: torchrun, quieter"),
    "extend": ("sidlm.cli.extend", "lengthen a model's context in stages with a gate after each"),
    "health": ("sidlm.cli.health", "where the processes of a run are, and what ended its starts"),
    "tokenizer": ("sidlm.cli.tokenizer", "train a tokenizer on your text"),
    "evaluate": ("sidlm.cli.evaluate", "bits per byte on held-out text, likelihood of answers on tasks"),
    "scaling": ("sidlm.cli.scaling", "scaling laws: run a grid of cells, fit, compare, forecast, plan"),
    "generate": ("sidlm.cli.generate", "continue a prompt"),
    "chat": ("sidlm.cli.chat", "talk to a model, or continue text in a loop"),
    "serve": ("sidlm.cli.serve", "an OpenAI-compatible server over a model"),
    "convert": ("sidlm.cli.convert", "a checkpoint into another layout, or a Llama into a Sid model"),
    "doctor": ("sidlm.cli.doctor", "what this machine can run, and a check that it computes the right numbers"),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: sid COMMAND [OPTIONS]",
        "",
        "Train and run Llama-family language models with 2-simplicial attention.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help     this text; `sid COMMAND --help` explains one command",
        "  -V, --version  the version",
        "",
        "start here: sid demo",
    ]
    return "\n".join(lines)


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else EXIT_ERROR
    if argv[0] in ("-V", "--version"):
        print(f"sid {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise SidError(f"unknown command {argv[0]!r}; {hint}")
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return module.main(list(argv[1:]))


def mistake(error: Exception) -> str | None:
    """One line for a mistake that the user can mend, None for a bug.

    The library raises ValueError and FileNotFoundError for bad input with a message that names it; the same types come
    out of torch or of a bug with one that does not. So they count as a mistake only where a `raise` of sidlm made them.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, SidError):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, (ValueError, FileNotFoundError)):
        return None
    file = trace.tb_frame.f_code.co_filename
    ours = Path(file).is_relative_to(Path(__file__).parents[1])
    return str(error) if ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise ") else None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``sid``; returns the exit status.

    A mistake is one line on stderr and status 2, Ctrl-C is 130. Anything else is a bug and keeps its traceback.
    """
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which then warns of its own files
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # the reader (head, less) has gone; keep the interpreter from complaining again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("sid: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = mistake(error)
        if message is None:
            raise
        print(f"sid: error: {' '.join(message.split())}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())

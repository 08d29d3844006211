"""``sid generate``: continue a prompt, printed as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, add_device, load, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    import argparse

    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM


class TextStream:
    """A ``streamer`` for ``generate`` that writes text as soon as it is whole.

    A token may end in the middle of a UTF-8 character; decoding then ends in U+FFFD. Those are held back until the
    next tokens complete them, or until the end shows that they are really broken.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.tokens: list[int] = []
        self._pending: list[int] = []
        self._written = 0  # characters of the pending tokens' text that are out already
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        # the first call brings the prompt
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        new = value.reshape(-1).tolist()
        self.tokens += new
        self._pending += new
        text = self.tokenizer.decode(self._pending, skip_special=True)
        whole = text.rstrip("\ufffd")
        self._emit(whole)
        if whole == text:
            self._pending, self._written = [], 0

    def end(self) -> None:
        self._emit(self.tokenizer.decode(self._pending, skip_special=True))
        self._pending, self._written = [], 0

    def _emit(self, text: str) -> None:
        if len(text) > self._written:
            self.write(text[self._written :])
            self._written = len(text)


def write_now(text: str) -> None:
    """Print without a newline and flush; characters the terminal's encoding lacks become "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=number(float, 0), default=0.8, help="default: 0.8; 0 is --greedy")
    parser.add_argument("--top-p", type=number(float, 0, 1), default=0.95, help="nucleus sampling, default: 0.95")
    parser.add_argument("--top-k", type=number(int, 0), default=0, help="only the k likeliest tokens; 0 (default): all")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token; no randomness")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the sampling; default: 0")
    add_device(parser)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed options as keyword arguments of ``complete``."""
    if args.greedy or args.temperature == 0:
        chosen: dict[str, Any] = {"do_sample": False}
    else:
        chosen = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return {"max_new_tokens": args.max_new_tokens, **chosen}


def complete(
    model: SidForCausalLM,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    write: Callable[[str], Any],
    *,
    max_new_tokens: int,
    **options: Any,
) -> TextStream:
    """Continue BOS-first ``tokens``, giving text to ``write`` piece by piece; the stream returned holds the new tokens.

    Ends at EOS, after ``max_new_tokens``, or on Ctrl-C (KeyboardInterrupt goes on to the caller with the text so far
    written). Raises SidError if prompt and new tokens together exceed the model's ``max_position_embeddings``.
    """
    import torch

    limit = model.config.max_position_embeddings
    if len(tokens) + max_new_tokens > limit:
        raise SidError(
            f"{len(tokens)} tokens of prompt and {max_new_tokens} new ones exceed the model's {limit} positions"
        )
    stream = TextStream(tokenizer, write)
    inputs = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    if options.get("do_sample") is False:
        # a folder's generation_config.json may set these, and transformers warns about them when greedy
        options |= {"temperature": None, "top_p": None, "top_k": None}
    generator: Any = model  # transformers types generate for a protocol of its own
    generator.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        streamer=stream,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        **options,
    )
    return stream


def main(argv: list[str]) -> int:
    parser = Parser(
        "generate",
        "Continue a prompt with a trained model; the text is printed as it is made.",
        '  sid generate runs/demo "def main():" --max-new-tokens 64 --temperature 0.7',
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    parser.add_argument("prompt", help='text to continue; "-" reads it from standard input')
    parser.add_argument("--num", type=number(int, 1), default=1, metavar="N", help="how many continuations; default: 1")
    add_sampling(parser)
    args = parser.parse_args(argv)

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = load(args.model, args.device)
    import torch

    torch.manual_seed(args.seed)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for index in range(args.num):
        if args.num > 1:
            write_now(f"--- {index + 1}/{args.num}\n")
        write_now(prompt)
        complete(model, tokenizer, tokens, write_now, **sampling(args))
        write_now("\n")
    return 0

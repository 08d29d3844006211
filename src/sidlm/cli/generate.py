"""``sid generate``: continue a prompt, printed as it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sidlm.cli.common import Parser, add_device, check_vocab, load, load_model, model_folder, number, resolve_device
from sidlm.errors import SidError

if TYPE_CHECKING:
    import argparse

    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.serve.decode import Sampling
    from sidlm.serve.grammar import Grammar


class Completion(NamedTuple):
    """What was generated: the ids, the last of which may end the text, and the text."""

    ids: list[int]
    text: str


class TextStream:
    """A ``streamer`` for transformers' ``generate`` that writes text as soon as it is whole."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any]) -> None:
        from sidlm.serve.text import Detokenizer

        self.write = write
        self.tokens: list[int] = []
        self._text = Detokenizer(tokenizer)
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        # the first call brings the prompt
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        new = value.reshape(-1).tolist()
        self.tokens += new
        self._emit(self._text.feed(new))

    def end(self) -> None:
        self._emit(self._text.end())

    def _emit(self, text: str) -> None:
        if text:
            self.write(text)


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
    parser.add_argument(
        "--min-p", type=number(float, 0, 1), default=0.0, help="only tokens this share as likely as the likeliest (0)"
    )
    parser.add_argument(
        "--repetition-penalty", type=number(float, 0.01), default=1.0, help="above 1: fewer tokens again (1)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token; no randomness")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the sampling; default: 0")
    add_device(parser)


def sampling(args: argparse.Namespace, *, turn: int = 0) -> Sampling:
    """The parsed options; each turn has draws of its own."""
    from sidlm.serve.decode import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed + turn,
    )


def complete(
    model: SidForCausalLM,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    write: Callable[[str], Any],
    *,
    sampling: Sampling,
    stop_ids: Collection[int] | None = None,
    stop: Sequence[str] = (),
    grammar: Grammar | None = None,
    chunk: int | None = None,
) -> Completion:
    """Continue BOS-first ``tokens``, giving text to ``write`` piece by piece.

    Ends at one of stop_ids (None: what the model ends a text with), before a stop string, after ``max_new_tokens``, or
    on Ctrl-C (KeyboardInterrupt goes on to the caller with the text so far written). Raises SidError if prompt and new
    tokens together exceed the model's ``max_position_embeddings``.
    """
    from sidlm.serve.decode import PREFILL_CHUNK, decode, end_ids
    from sidlm.serve.text import Detokenizer, StopStrings

    text, stops = Detokenizer(tokenizer), StopStrings(stop)
    said, ids = [], []

    def say(piece: str) -> None:
        said.append(piece)
        if piece:
            write(piece)

    for chosen in decode(
        model, tokens, sampling, stop_ids=end_ids(model, tokenizer) if stop_ids is None else stop_ids, grammar=grammar,
        vocab_size=tokenizer.vocab_size, chunk=chunk or PREFILL_CHUNK,
    ):  # fmt: skip
        ids.append(chosen.id)
        say(stops.feed(text.feed((chosen.id,))))
        if stops.stopped:
            break
    say(stops.feed(text.end()) + stops.end())
    return Completion(ids, "".join(said))


def search(
    model: SidForCausalLM,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    write: Callable[[str], Any],
    args: Any,
    turn: int,
) -> None:
    """The same by transformers' ``generate``, for beams, lookups, assistants and static caches."""
    import torch

    from sidlm.serve.decode import check_prompt, end_ids

    check_prompt(model, tokens, args.max_new_tokens)
    torch.manual_seed(args.seed + turn)
    inputs = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    greedy = args.greedy or args.temperature == 0
    options: dict[str, Any] = {"do_sample": not greedy, "num_beams": args.num_beams}
    warpers = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    # a folder's generation_config.json may set these, and transformers warns about them when greedy
    options |= dict.fromkeys(warpers) if greedy else warpers
    options |= {"repetition_penalty": args.repetition_penalty, "prefill_chunk_size": args.prefill_chunk}
    if args.cache == "static":
        options["cache_implementation"] = "static"
    if args.prompt_lookup:
        options["prompt_lookup_num_tokens"] = args.prompt_lookup
    if args.assistant:
        helper = load_model(model_folder(args.assistant), resolve_device(args.device), tokenizer)
        options["assistant_model"] = helper
    # beams are settled at the end only
    stream = None if args.num_beams > 1 else TextStream(tokenizer, write)
    generator: Any = model  # transformers types generate for a protocol of its own
    out = generator.generate(
        inputs, attention_mask=torch.ones_like(inputs), streamer=stream, max_new_tokens=args.max_new_tokens,
        eos_token_id=list(end_ids(model, tokenizer)), pad_token_id=tokenizer.pad_id, **options,
    )  # fmt: skip
    if stream is None:
        write(tokenizer.decode(out[0, len(tokens) :].tolist(), skip_special=True))


def main(argv: list[str]) -> int:
    parser = Parser(
        "generate",
        "Continue a prompt with a trained model; the text is printed as it is made.",
        '  sid generate runs/demo "def main():" --max-new-tokens 64 --temperature 0.7\n'
        '  sid generate runs/demo "A person: " --json-schema person.json',
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    parser.add_argument("prompt", help='text to continue; "-" reads it from standard input')
    parser.add_argument("--num", type=number(int, 1), default=1, metavar="N", help="how many continuations; default: 1")
    add_sampling(parser)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json-schema", metavar="FILE", help="what is generated is JSON of this schema")
    parser.add_argument("--prefill-chunk", type=number(int, 1), metavar="N", help="tokens of the prompt at once")
    parser.add_argument("--num-beams", type=number(int, 1), default=1, metavar="N", help="beam search; default: 1")
    parser.add_argument("--prompt-lookup", type=number(int, 1), metavar="N", help="guess N tokens from the prompt")
    parser.add_argument("--assistant", metavar="MODEL", help="a smaller model with the same tokenizer, which guesses")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="static: allocated at once")
    args = parser.parse_args(argv)

    searched = [
        name
        for name, given in (
            ("--num-beams", args.num_beams > 1), ("--prompt-lookup", args.prompt_lookup),
            ("--assistant", args.assistant), ("--cache static", args.cache == "static"),
        )
        if given
    ]  # fmt: skip
    if searched and (args.stop or args.json_schema):
        raise SidError(f"{'--stop' if args.stop else '--json-schema'} does not go with {searched[0]}")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    schema = _read_schema(args.json_schema) if args.json_schema else None
    model, tokenizer = load(args.model, args.device)
    if args.assistant:
        _check_assistant(args.assistant, tokenizer)
    grammar = None
    if schema is not None:
        from sidlm.serve.grammar import GrammarCompiler

        grammar = GrammarCompiler(tokenizer).json(schema)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for index in range(args.num):
        if args.num > 1:
            write_now(f"--- {index + 1}/{args.num}\n")
        write_now(prompt)
        if searched:
            search(model, tokenizer, tokens, write_now, args, index)
        else:
            own = grammar.copy() if grammar else None
            rules = sampling(args, turn=index)
            complete(
                model, tokenizer, tokens, write_now, sampling=rules, stop=args.stop, grammar=own,
                chunk=args.prefill_chunk,
            )  # fmt: skip
        write_now("\n")
    return 0


def _read_schema(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            schema = json.load(file)
        except (ValueError, RecursionError) as error:
            raise SidError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise SidError(f"{path} holds no JSON schema but {type(schema).__name__}")
    return schema


def _check_assistant(path: str, tokenizer: Tokenizer) -> None:
    """Raise SidError unless the assistant's tokens are the model's."""
    from sidlm.cli.common import load_tokenizer

    theirs = load_tokenizer(model_folder(path))
    check_vocab(theirs, tokenizer.vocab_size)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise SidError(f"--assistant {path} has another tokenizer than the model: its tokens mean something else")

"""`sid tokenizer`: train a byte-level BPE tokenizer, look at one, encode and decode with it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sidlm.cli.common import Parser, number
from sidlm.errors import SidError

ABOUT = "Train a byte-level BPE tokenizer with Llama 3's rules on your text, or use one."
USAGE = """usage: sid tokenizer COMMAND [OPTIONS]

{about}

commands:
  train   train on text files, folders, globs, .jsonl[.gz|.zst], .parquet, hf:NAME or 'embedded'
  encode  text to token ids
  decode  token ids to text
  info    what a tokenizer is: vocabulary, special tokens, bytes per token

`sid tokenizer COMMAND --help` explains one command.

example:
  sid tokenizer train my-texts/ --out my-tokenizer --vocab-size 8192
  sid tokenizer encode my-tokenizer "Hello, world"
"""


def main(argv: list[str]) -> int:
    commands = {"train": _train, "encode": _encode, "decode": _decode, "info": _info}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(about=ABOUT), end="")
        return 0 if argv else 2
    if argv[0] not in commands:
        raise SidError(f"sid tokenizer: unknown command {argv[0]!r}; there are {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def _train(argv: list[str]) -> int:
    parser = Parser(
        "tokenizer train",
        "Train a tokenizer and save it in a folder that sid and transformers' AutoTokenizer load. The same sources\n"
        "give the same tokenizer. Text files, and .jsonl or .parquet with a text field, are read;\n"
        "a folder is searched for them.",
        "  sid tokenizer train corpus/*.jsonl.zst --out tok --vocab-size 16384\n"
        "  sid tokenizer train embedded --out tok --vocab-size 4096",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="PATH or PATH=WEIGHT (the source's share of the sample)"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--vocab-size", type=number(int, 267), default=4096, help="tokens in all, special ones included (%(default)s)"
    )
    parser.add_argument(
        "--num-special",
        type=number(int, 11),
        default=256,
        help="special tokens at the end, as in Llama 3 (%(default)s)",
    )
    parser.add_argument(
        "--max-bytes", type=number(int, 1), default=100_000_000, help="train on at most this much text (%(default)s)"
    )
    parser.add_argument(
        "--text-key", default="text", help="field of .jsonl and .parquet that holds the text (%(default)s)"
    )
    parser.add_argument(
        "--skip-corrupt", action="store_true", help="skip the rest of a damaged file instead of stopping"
    )
    parser.add_argument("--cache-dir", default="", help="cache folder (default $SID_CACHE or ~/.cache/sid)")
    args = parser.parse_args(argv)
    from sidlm.data.config import DataConfig
    from sidlm.data.prepare import prepare_tokenizer

    cfg = DataConfig(
        train=tuple(args.sources),
        valid_fraction=0.0,  # nothing is held out of a tokenizer trained by itself
        vocab_size=args.vocab_size,
        text_key=args.text_key,
        skip_corrupt=args.skip_corrupt,
        cache_dir=args.cache_dir,
    )
    log = lambda line: print(line, file=sys.stderr)  # noqa: E731
    tokenizer = prepare_tokenizer(cfg, args.out, num_special=args.num_special, max_bytes=args.max_bytes, log=log)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.special_ids)} of them special")
    return 0


def _encode(argv: list[str]) -> int:
    parser = Parser(
        "tokenizer encode",
        "Print the token ids of a text.",
        '  sid tokenizer encode tok "Hello"\n  sid tokenizer encode tok --file a.txt',
    )
    _add_tokenizer(parser)
    parser.add_argument("text", nargs="*", help="the text; none of it and no --file: standard input")
    parser.add_argument("--file", help="a UTF-8 file to encode")
    parser.add_argument("--pieces", action="store_true", help="show the text of each token instead of its id")
    args = parser.parse_args(argv)
    tokenizer = _load(args.tokenizer)
    ids = tokenizer.encode(_text(args))
    print(
        json.dumps([tokenizer.decode([i]) for i in ids], ensure_ascii=False) if args.pieces else " ".join(map(str, ids))
    )
    return 0


def _decode(argv: list[str]) -> int:
    parser = Parser(
        "tokenizer decode",
        "Print the text of token ids.",
        "  sid tokenizer decode tok 72 101 108\n  ... | sid tokenizer decode tok",
    )
    _add_tokenizer(parser)
    parser.add_argument("ids", nargs="*", help="token ids; none: read from standard input")
    args = parser.parse_args(argv)
    words = args.ids or sys.stdin.read().replace(",", " ").strip("[] \n").split()
    bad = next((word for word in words if not word.strip(",[]").isdigit()), None)
    if bad is not None:
        raise SidError(f"sid tokenizer decode: {bad!r} is not a token id")
    sys.stdout.write(_load(args.tokenizer).decode(int(word.strip(",[]")) for word in words) + "\n")
    return 0


def _info(argv: list[str]) -> int:
    parser = Parser("tokenizer info", "Say what a tokenizer is.", "  sid tokenizer info tok --file sample.txt")
    _add_tokenizer(parser)
    parser.add_argument("--file", help="also measure bytes per token on this UTF-8 file")
    args = parser.parse_args(argv)
    tokenizer = _load(args.tokenizer)
    print(f"vocabulary    {tokenizer.vocab_size:,} tokens")
    for name in ("bos", "eos", "pad"):
        print(f"{name}           {getattr(tokenizer, f'{name}_id')} {getattr(tokenizer, f'{name}_token')}")
    shown = [f"{i} {content}" for content, i in tokenizer.special_ids.items()]
    print(f"special       {len(shown)}: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}")
    print(f"fingerprint   {tokenizer.fingerprint}")
    if args.file:
        text = _read(args.file)
        count = len(tokenizer.encode(text))
        size = len(text.encode())
        print(f"compression   {size / max(count, 1):.3f} bytes per token ({size:,} bytes, {count:,} tokens)")
    return 0


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", help="a tokenizer folder, a tokenizer.json, or Llama 3's tokenizer.model")


def _load(path: str):
    from sidlm.data.tokenizer import Tokenizer

    return Tokenizer.load(path)


def _text(args: argparse.Namespace) -> str:
    if args.file and args.text:
        raise SidError("sid tokenizer encode: give a text or --file, not both")
    if args.file:
        return _read(args.file)
    return " ".join(args.text) if args.text else sys.stdin.read()


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SidError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error

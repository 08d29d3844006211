"""``sid convert``: a checkpoint into another layout, or a Llama into a Sid model, with a check of the logits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, model_folder, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    from torch import Tensor

    from sidlm.models.convert.source import Checkpoint

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MEASURED = 10
"""One in so many rows of text is not fitted to: the loss is compared there."""


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        "convert",
        "Write a checkpoint in another layout, with bounded memory, and compare the logits of the two.\n"
        "Reads folders of transformers (Llama, Sid), Meta's (params.json, consolidated.*.pth) and checkpoints of a\n"
        "training (RUN/checkpoints/step-*, or RUN/checkpoints for the newest).",
        "  sid convert Llama-3.1-8B/original runs/llama-8b\n"
        "  sid convert runs/demo exported --to llama\n"
        "  sid convert runs/demo/checkpoints/step-00000100 exported-100\n"
        "  sid convert runs/llama-8b original --to meta --shards 8\n"
        "  sid convert runs/llama-8b runs/sid-8b --simplicial-every 4 --simplicial-window 8192 1",
    )
    parser.add_argument(
        "source", help="folder of a checkpoint, the run folder of a training, or a step of its folder checkpoints"
    )
    parser.add_argument("out", help="folder to write; it must not exist")
    parser.add_argument(
        "--to",
        choices=("sid", "llama", "meta", "gguf"),
        default="sid",
        help="sid (default) and llama: folders of transformers; meta: consolidated.*.pth and params.json; "
        "gguf: model.gguf for llama.cpp",
    )
    add = parser.add_argument
    add("--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: as they are")
    add("--max-shard-gb", type=number(float, 0.001), default=5.0, metavar="GB", help="size of a safetensors file")
    add("--shards", type=number(int, 1), metavar="N", help="model-parallel ranks of --to meta; default: 1")
    add(
        "--portable",
        action="store_true",
        help="put the model's code beside the weights: loads with trust_remote_code where Sid is not installed",
    )
    add(
        "--rope-factor",
        type=number(float, 1),
        metavar="F",
        help="factor of scaled rotary embeddings in a source of Meta's, whose files do not say; default: 32 with tied "
        "embeddings (Llama 3.2), else 8",
    )
    add = parser.add_argument_group("from a Llama to a Sid model").add_argument
    add(
        "--simplicial-every",
        type=number(int, 1),
        metavar="N",
        help="make every N-th layer 2-simplicial, starting as attention over the first window",
    )
    add(
        "--simplicial-window",
        type=number(int, 1),
        nargs=2,
        default=[512, 32],
        metavar=("W1", "W2"),
        help="logits are unchanged for documents of up to W1 tokens; default: 512 32",
    )
    add(
        "--squared-relu",
        nargs="+",
        metavar="SOURCE",
        help="replace SwiGLU by squared-ReLU layers fitted on this text (file, folder, .jsonl, ...)",
    )
    add(
        "--squared-relu-width",
        type=number(int, 8),
        metavar="W",
        help="default: 3/2 of the former, for as many parameters; at most twice",
    )
    add("--squared-relu-steps", type=number(int, 0), default=500, metavar="N", help="of each layer's fit; default: 500")
    add("--rows", type=number(int, 2), default=64, metavar="N", help="rows of text to fit on; default: 64")
    add("--row-tokens", type=number(int, 2), default=512, metavar="N", help="tokens of a row; default: 512")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise SidError for options that do not go together."""
    if args.shards and args.to != "meta":
        raise SidError(f"--shards is for --to meta, not {args.to}; --max-shard-gb limits safetensors files")
    if args.portable and args.to != "sid":
        raise SidError(f"--portable is for --to sid, not {args.to}")
    if args.to != "sid" and (args.simplicial_every or args.squared_relu):
        raise SidError(f"--simplicial-every and --squared-relu make Sid models: they need --to sid, not {args.to}")


def text_rows(folder: Path, sources: Sequence[str], rows: int, length: int) -> Tensor:
    """(rows, length) token ids of the beginning of the sources, by the tokenizer beside the weights."""
    import torch
    from tokenizers import Tokenizer

    from sidlm.data.config import DataConfig
    from sidlm.data.sources import iter_documents

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SidError(f"--squared-relu needs the model's tokenizer: no tokenizer.json in {folder}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise SidError(f"{file}: {' '.join(str(error).split())}") from error
    ids: list[int] = []
    for source in sources:
        for document in iter_documents(source, DataConfig()):
            ids += tokenizer.encode(document.text).ids
            if len(ids) >= rows * length:
                return torch.tensor(ids[: rows * length]).view(rows, length)
    raise SidError(f"the text has {len(ids)} tokens, fewer than --rows {rows} x --row-tokens {length}")


def transformed(args: argparse.Namespace, source: Checkpoint) -> tuple[Checkpoint, Tensor | None]:
    """What is to be written, and the rows of text on which its loss may differ from the source's."""
    import torch

    from sidlm.models.convert.run import Cast
    from sidlm.models.convert.upcycle import Distilled, Upcycled

    if args.dtype:
        source = Cast(source, getattr(torch, DTYPES[args.dtype]))
    if args.simplicial_every:
        source = Upcycled(source, args.simplicial_every, tuple(args.simplicial_window))
    if not args.squared_relu:
        return source, None
    ids = text_rows(source.folder, args.squared_relu, args.rows, args.row_tokens)
    if int(ids.max()) >= source.config.vocab_size:
        raise SidError(f"the tokenizer gives id {int(ids.max())}, but the model has {source.config.vocab_size}")
    width, steps = args.squared_relu_width, args.squared_relu_steps
    return Distilled(source, ids, width=width, steps=steps, log=print), ids[-max(1, len(ids) // MEASURED) :]


def main(argv: list[str]) -> int:
    args = parse(argv)
    check(args)
    from sidlm.models.convert.check import random_prompt, text_loss
    from sidlm.models.convert.run import PROMPT, Cast, convert, open_checkpoint
    from sidlm.train.checkpoint import numbered, replacing
    from sidlm.train.export import open_run_checkpoint

    out, folder = Path(args.out), Path(args.source)
    if out.exists():
        raise SidError(f"{out} exists: choose a new folder, a checkpoint is never overwritten")
    if (folder / "state.json").is_file() or numbered(folder):
        source: Checkpoint = open_run_checkpoint(folder)
    else:
        meta = (folder / "params.json").is_file()
        source = open_checkpoint(folder if meta else model_folder(folder), rope_factor=args.rope_factor)
    target, rows = transformed(args, source)
    reference = Cast(source, next(iter(target.tensors.values())).dtype) if args.dtype else source
    length = min(PROMPT, args.simplicial_window[0]) if args.simplicial_every else PROMPT
    size = sum(entry.nbytes for entry in target.tensors.values())
    with replacing(out, size) as temporary:
        report = convert(
            target,
            temporary,
            layout=args.to,
            ranks=args.shards or 1,
            max_bytes=int(args.max_shard_gb * 1e9),
            reference=reference,
            exact=rows is None,
            portable=args.portable,
            prompt=random_prompt(source.config.vocab_size, length),
        )
        if rows is not None:
            before, after = text_loss(reference, rows), text_loss(open_checkpoint(temporary), rows)
            print(f"loss on held-out text: {before:.4f} -> {after:.4f} nats per token")
    print(report.check)
    print(f"{out}: {args.to}, {report.parameters:,} parameters, {report.nbytes / 1e6:,.1f} MB")
    return 0

"""``sid evaluate``: bits per byte on held-out text and likelihood of answers on task files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, add_device, load, number, run_config, write_json
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.config import DataConfig
    from sidlm.data.sources import Document
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.evaluate import DomainNLL, TaskResult
    from sidlm.train.config import RunConfig


def documents(cfg: DataConfig) -> Iterator[Document]:
    """Documents of all of ``cfg.valid``. Raises SidError naming the source that cannot be read or holds no text."""
    from sidlm.data.sources import iter_documents

    for source in cfg.valid:
        found = iter_documents(source, cfg)
        first = next(found, None)
        if first is None:
            raise SidError(f"no text in {source}: every document is empty, or there is none")
        yield first
        yield from found


def held_out(run: RunConfig | None, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents that a run kept out of its training. Raises SidError if there is no run or it kept none."""
    from sidlm.data.loader import open_data
    from sidlm.data.sources import Document

    if run is None:
        raise SidError("nothing to evaluate: the model lies in no run folder, so give --data, --tasks or both")
    valid = open_data(run.data, tokenizer).valid
    if not len(valid):
        raise SidError(f"the run {run.train.out} held out no documents (data.valid_fraction): give --data")
    return (Document(text=document.text, domain=document.domain) for document in valid)


def show_domains(result: dict[str, DomainNLL]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out text")
    table.add_column("domain", no_wrap=True)
    for title in ("documents", "tokens", "bytes", "nats/token", "bits/byte"):
        table.add_column(title, justify="right", no_wrap=True)
    for domain, part in result.items():
        table.add_row(
            domain,
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f"{part.bytes:,}",
            f"{part.nll_per_token:.4f}",
            f"{part.bits_per_byte:.4f}",
            style="bold" if domain == "all" else None,
        )
    Console().print(table)


def show_tasks(results: dict[str, TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    def share(value: float | None, ci95: float | None) -> str:
        return "" if value is None or ci95 is None else f"{100 * value:.1f} ± {100 * ci95:.1f}"

    table = Table(title="answers (NLL of the right one in nats; accuracy in % ± 95%)")
    table.add_column("task", overflow="fold")  # the file's name; the JSON has its whole path
    for title in ("questions", "NLL", "/token", "/byte", "accuracy", "per byte", "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, part in results.items():
        table.add_row(
            Path(name).name,
            f"{part.questions:,}",
            f"{part.nll:.3f}",
            f"{part.nll_per_token:.4f}",
            f"{part.nll_per_byte:.4f}",
            share(part.accuracy, part.accuracy_ci95),
            share(part.accuracy_per_byte, part.accuracy_per_byte_ci95),
            "" if part.chance is None else f"{100 * part.chance:.1f}",
        )
    Console().print(table)
    for name, part in results.items():
        if part.cut:
            print(f"{name}: {part.cut} prompts were longer than the model's context and lost their beginning")


def parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        "evaluate",
        "Bits per byte of held-out text, per domain, and likelihood of the right answer on question files.",
        "  sid evaluate runs/demo\n"
        "  sid evaluate runs/demo --data notes.txt --json result.json\n"
        "  sid evaluate runs/demo --tasks arc.jsonl gsm8k.jsonl.zst\n\n"
        "A line of a task file is {question, choices, answer}, with the answer's index, letter or text, or\n"
        "{prompt, completion}.",
    )
    parser.add_argument("model", help="model folder, or the run folder of a training")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text file, folder, .jsonl[.zst|.gz], .parquet or glob; default, if there are no --tasks either: what the "
        "training of this model held out",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="FILE", help=".jsonl or .jsonl.zst files of questions"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the result to this file")
    parser.add_argument(
        "--seq-len",
        type=number(int, 1),
        metavar="N",
        help="tokens of context; compare models at the same one; default: the row length of the training, if known",
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=8, metavar="N", help="rows at once; default: 8")
    parser.add_argument("--text-key", default="text", help="field of a document's text in .jsonl and .parquet")
    parser.add_argument("--domain-key", default="domain", help="field of its domain, if there is one")
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    from sidlm.data.config import DataConfig
    from sidlm.evaluate import bits_per_byte, read_task, score_task

    cfg = DataConfig(valid=tuple(args.data), text_key=args.text_key, domain_key=args.domain_key)
    tasks = {file: read_task(file) for file in args.tasks}
    run = run_config(args.model)
    model, tokenizer = load(args.model, args.device)
    limit = model.config.max_position_embeddings
    seq_len = args.seq_len or (run.data.seq_len if run else limit)
    if seq_len > limit:
        raise SidError(f"--seq-len {seq_len} exceeds the model's {limit} positions")
    report: dict[str, Any] = {"model": args.model, "seq_len": seq_len}
    if args.data or not tasks:
        text = documents(cfg) if args.data else held_out(run, tokenizer)
        found = bits_per_byte(model, tokenizer, text, seq_len=seq_len, batch_size=args.batch_size)
        report["data"] = {domain: part.as_dict() for domain, part in found.items()}
        show_domains(found)
    if tasks:
        scores = {
            file: score_task(model, tokenizer, questions, batch_size=args.batch_size)
            for file, questions in tasks.items()
        }
        report["tasks"] = {file: dataclasses.asdict(part) for file, part in scores.items()}
        show_tasks(scores)
    if args.json:
        write_json(args.json, report)
    return 0

"""``sid scaling probe``: how many examples each kind of attention needs to learn a task."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from sidlm.cli.common import Parser, number
from sidlm.errors import SidError

EXAMPLE = """  sid scaling probe --tasks match3 --variants full trilinear determinant
  sid scaling probe --examples 256 1024 4096 --seeds 0 1 2 --json probes.jsonl

Lines of --json that are there already are not run again."""


def parse(argv: list[str]) -> Any:
    from sidlm.scaling.probes.curves import VARIANTS
    from sidlm.scaling.probes.tasks import TASKS

    parser = Parser(
        "scaling probe", "Train small models on tasks over triples; accuracy on problems held out.", EXAMPLE
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--examples", nargs="+", type=number(int, 1), default=[256, 1024, 4096], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0], metavar="N")
    parser.add_argument("--steps", type=number(int, 1), default=1000)
    parser.add_argument("--batch", type=number(int, 1), default=64, help="rows of a step")
    parser.add_argument("--lr", nargs="+", type=number(float, 0.0), default=[2e-3])
    parser.add_argument("--width", type=number(int, 16), default=64)
    parser.add_argument("--layers", type=number(int, 1), default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE", help="a line for each run, as it ends")
    parser.add_argument(
        "--part", metavar="I/N", default="0/1", help="only the runs I, I + N, ...: for several processes"
    )
    return parser.parse_args(argv)


def probe(argv: list[str]) -> int:
    args = parse(argv)
    from sidlm.scaling.probes.curves import Probe, run_probe
    from sidlm.train.hardware import resolve_device

    try:
        part, parts = (int(x) for x in args.part.split("/"))
    except ValueError:
        raise SidError(f"--part is I/N, such as 0/4, got {args.part!r}") from None
    if not 0 <= part < parts:
        raise SidError(f"--part I/N needs 0 <= I < N, got {args.part!r}")
    path = Path(args.json) if args.json else None
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.is_file() else []
    known = {row["name"] for row in rows}
    settings = itertools.product(args.seeds, args.examples, args.tasks, args.lr, args.variants)
    wanted = [
        Probe(task=t, variant=v, examples=n, seed=s, lr=lr, steps=args.steps, batch=args.batch, width=args.width,
              layers=args.layers)
        for s, n, t, lr, v in settings
    ]  # fmt: skip
    device = resolve_device(args.device)
    for one in wanted[part::parts]:
        if one.name in known:
            continue
        try:
            row = run_probe(one, device=device)
        except ValueError as error:
            raise SidError(f"{one.task}: {error}") from error
        rows.append(row)
        print(f"{one.name}: {row['accuracy']:.3f} (chance {row['chance']:.3f})", flush=True)
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table([row for row in rows if row["name"] in {one.name for one in wanted}]))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean accuracy over the seeds, and the lowest and highest, by task, examples and variant."""
    cells: dict[tuple[str, int, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["task"], row["examples"], row["chance"]][row["variant"]].append(row["accuracy"])
    names = sorted({row["variant"] for row in rows})
    lines = ["| task (chance) | examples | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for (task, examples, chance), found in sorted(cells.items()):
        shown = [found.get(name, []) for name in names]
        texts = [f"{sum(x) / len(x):.3f} ({min(x):.3f} to {max(x):.3f})" if x else "" for x in shown]
        lines.append(f"| {task} ({chance:.3f}) | {examples} | " + " | ".join(texts) + " |")
    return "\n".join(lines)

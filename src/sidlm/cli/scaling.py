"""``sid scaling COMMAND``: grids of training runs; fits of their losses, forecasts and plans."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidlm.cli.common import Parser, number
from sidlm.errors import SidError

COMMANDS = {
    "run": ("sidlm.cli.scaling", "train the cells of a grid that are not done yet, or list them"),
    "collect": ("sidlm.cli.scaling", "write the cells.jsonl of a grid's folder"),
    "fit": ("sidlm.cli.scaling_fit", "the law of each variant with intervals, and tests of what differs"),
    "efficiency": ("sidlm.cli.scaling_fit", "tokens, FLOPs and seconds to reach another variant's loss"),
    "plan": ("sidlm.cli.scaling_fit", "parameters and tokens for a budget of FLOPs"),
    "forecast": ("sidlm.cli.scaling_fit", "a benchmark's accuracy at a budget of FLOPs"),
    "probe": ("sidlm.cli.scaling_probe", "train small models on tasks over pairs and triples, by number of examples"),
}
"""Command -> (module, what it does); the module has a function of the command's name."""


def usage() -> str:
    lines = ["usage: sid scaling COMMAND [OPTIONS]", "", "Scaling laws: run a grid, fit, compare, forecast, plan.", ""]
    lines += ["commands:", *(f"  {name:<10}  {about}" for name, (_, about) in COMMANDS.items()), ""]
    return "\n".join([*lines, "`sid scaling COMMAND --help` explains one command; docs/scaling.md shows them all"])


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "cell":  # what `run` starts in processes of their own
        return cell(argv[1:])
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise SidError(f"unknown command 'scaling {argv[0]}'; {hint}")
    return getattr(importlib.import_module(COMMANDS[argv[0]][0]), argv[0])(argv[1:])


def parse_run(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The options, and the settings of `sid train` that follow them."""
    first = next((i for i, word in enumerate(argv) if re.match(r"--\w+\.", word)), len(argv))
    parser = Parser(
        "scaling run",
        "Train the cells of a grid: sizes x budgets x variants x seeds. Finished cells are kept, a killed run goes on; "
        "several of these commands may share one folder.",
        "  sid scaling run grid.yaml --list\n"
        "  sid scaling run grid.yaml --out runs/grid --workers 2\n"
        "  sid scaling run grid.yaml --out runs/grid --data.train books/ --data.valid held-out.jsonl\n\n"
        "Settings of `sid train` come last and hold for every cell. docs/scaling.md describes grid.yaml.",
    )
    parser.add_argument("grid", help="the grid, a YAML file")
    parser.add_argument("--out", metavar="FOLDER", help="where the cells' folders are; default: runs/NAME-OF-THE-GRID")
    parser.add_argument(
        "--workers", type=number(int, 1), default=1, metavar="N", help="cells at once, also on one GPU; default: 1"
    )
    parser.add_argument(
        "--list", "--dry-run", action="store_true", help="print the cells and their FLOPs, train nothing"
    )
    parser.add_argument(
        "--keep-models", action="store_true", help="keep the last checkpoint and the model of finished cells"
    )
    return parser.parse_args(argv[:first]), list(argv[first:])


def run(argv: list[str]) -> int:
    """0 if all cells are finished, 1 if some failed, 128 + the signal that ended it early."""
    args, settings = parse_run(argv)
    from sidlm.scaling.grid import read_grid
    from sidlm.scaling.runner import Runner, write_cells

    out = Path(args.out or Path("runs") / Path(args.grid).stem)
    cells = read_grid(args.grid, out, settings)
    if args.list:
        show_cells(cells, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    outcome = Runner(
        cells,
        out,
        command=[sys.executable, "-m", "sidlm.cli.main", "scaling", "cell"],
        workers=args.workers,
        facts={"keep_models": args.keep_models},
        log=lambda line: print(line, flush=True),
    ).run()
    path = write_cells(out)
    print(f"{len(outcome.finished)} of {len(cells)} cells are finished: {path}")
    for name, reason in outcome.failed.items():
        print(f"sid: error: cell {name} failed: {reason} (all it said: {out / name / 'log.txt'})", file=sys.stderr)
    if outcome.signal:
        print(f"sid: stopped by signal {outcome.signal}; the same command goes on", file=sys.stderr)
        return 128 + outcome.signal
    return 1 if outcome.failed else 0


def show_cells(cells: Sequence[Any], out: Path) -> None:
    """A table of the cells, with what they will cost."""
    from sidlm.scaling.cell import result_of

    width = max(len(cell.name) for cell in cells)
    print(f"{'cell':<{width}}  {'parameters':>14}  {'tokens':>14}  {'steps':>8}  {'FLOPs':>9}")
    left = 0.0
    for cell in cells:
        done = result_of(out / cell.name) is not None
        left += 0 if done else cell.flops
        print(
            f"{cell.name:<{width}}  {cell.params:>14,}  {cell.tokens:>14,}  {cell.cfg.train.steps:>8,}  "
            f"{cell.flops:>9.3g}{'  done' if done else ''}"
        )
    print(f"{len(cells)} cells, {sum(cell.flops for cell in cells):.3g} FLOPs, {left:.3g} of them still to do")


def cell(argv: list[str]) -> int:
    """FOLDER RUNNER: train the cell in the folder for the runner, a process id, and no longer than that lives."""
    from sidlm.scaling.cell import run_cell, stop_with_parent

    stop_with_parent(int(argv[1]))
    return run_cell(Path(argv[0]))


def collect(argv: list[str]) -> int:
    parser = Parser(
        "scaling collect",
        "Write FOLDER/cells.jsonl: a line for each cell of the grid, finished, failed or not begun.",
        "  sid scaling collect runs/grid",
    )
    parser.add_argument("folder", help="the --out of `sid scaling run`")
    folder = Path(parser.parse_args(argv).folder)
    if not folder.is_dir():
        raise SidError(f"no such folder: {folder}")
    from sidlm.scaling.runner import collect, write_cells

    rows = collect(folder)
    if not rows:
        raise SidError(f"no cells in {folder}: give the --out of `sid scaling run`")
    print(f"{sum('error' not in row for row in rows)} of {len(rows)} cells are finished: {write_cells(folder)}")
    return 0

"""Tables and plots of the study of token efficiency, from its cells.

python benchmarks/token_report.py CELLS.jsonl [...] [--probes PROBES.jsonl] --markdown OUT.md --plots FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from _token_statistics import (
    Mean,
    Row,
    common_spread,
    differences,
    exponent,
    key,
    mean,
    pooled,
    seeds_needed,
    slope,
    tokens_saved,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = ("xs", "s", "m", "l")
CORE = ("full", "sliding", "trilinear", "determinant", "deeper")
COLOURS = {name: f"C{i}" for i, name in enumerate(CORE)}


def read(paths: list[Path]) -> tuple[list[Row], list[Row]]:
    """(finished cells, the others)."""
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    done = {row["name"] + row["group"] * (row["group"] == "speed"): row for row in rows if row["status"] == "done"}
    return list(done.values()), [row for row in rows if row["status"] != "done" and row["name"] not in done]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def main_length(done: list[Row]) -> list[Row]:
    """The cells that are compared across sizes: the core's length, base rate and batch, no repeats."""
    steps = [row["steps"] for row in done if row["group"] == "core"]
    return [
        row
        for row in done
        if row["steps"] == statistics.mode(steps) and row["lr"] == 1 and row["batch"] == 16 and not row["repeat"]
        and row["group"] != "speed"
    ]  # fmt: skip


def noise(done: list[Row]) -> str:
    groups: dict[tuple[float, int, float], list[Row]] = defaultdict(list)
    for row in done:
        if row["variant"] == "full" and row["size"] == "s" and row["group"] != "speed" and not row["repeat"]:
            groups[row["tokens"] / 1e6, row["batch"], row["lr"]].append(row)
    body = []
    for (tokens, batch, _), rows in sorted(groups.items()):
        values = [row["loss"] for row in sorted(rows, key=lambda r: r["seed"])]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        body.append([f"{tokens:.1f}", str(batch), f"{rows[0]['peak_lr']:.2g}", f"{statistics.mean(values):.4f}", spread,
                     ", ".join(f"{v:.4f}" for v in values)])  # fmt: skip
    return table(["M tokens", "rows a step", "peak lr", "loss", "sd of seeds", "by seed"], body)


def resolution(rows: list[Row]) -> str:
    """Spread of paired differences by size, and the seeds that 0.02 nats take."""
    body = []
    for size in (*SIZES, "all"):
        here = [row for row in rows if size in (row["size"], "all")]
        spread, degrees = pairs_spread(here)
        plain = [[row["loss"] for row in here if (row["size"], row["variant"]) == (s, "full")] for s in SIZES]
        if degrees:
            seeds = common_spread([g for g in plain if g])[0]
            body.append([size, f"{seeds:.4f}", f"{spread:.4f}", str(seeds_needed(spread, 0.02)),
                         str(seeds_needed(spread, 0.01))])  # fmt: skip
    return table(["size", "sd of seeds (full)", "sd of paired differences", "seeds for ±0.02", "for ±0.01"], body)


def paired(groups: list[list[float]], spread: tuple[float, int]) -> Mean | None:
    """`pooled`, or None without a pair."""
    return pooled(groups, *spread) if any(groups) else None


def core(rows: list[Row], done: list[Row]) -> str:
    """Every size by itself. Intervals have the spread common to all sizes and variants.

    Where the baseline ran at several lengths: tokens saved at equal loss, and the difference from a baseline that gets
    more tokens for equal FLOPs.
    """
    body = []
    spread = pairs_spread(rows)
    for size in SIZES:
        here = [row for row in rows if row["size"] == size]
        full = next((row for row in here if row["variant"] == "full"), None)
        steepness = slope(done, size)
        for variant in CORE:
            mine = [row for row in here if row["variant"] == variant]
            if not mine or full is None:
                continue
            relative = mine[0]["flops"] / full["flops"]
            to = {
                b: paired([differences(here, variant, b)], spread) if variant != b else None
                for b in ("full", "sliding")
            }
            saved = equal = ""
            if to["full"] and steepness:
                saved = "{:+.0%} ({:+.0%} to {:+.0%})".format(*tokens_saved(to["full"], steepness))
                gain = abs(steepness.value) * math.log(relative)
                equal = str(Mean(to["full"].value + gain, to["full"].half, to["full"].count))
            body.append([size, variant, f"{mine[0]['params_non_embedding'] / 1e6:.2f}", f"{relative:.3f}",
                         f"{statistics.mean(r['loss'] for r in mine):.4f} ({len(mine)})",
                         *(str(m or "") for m in to.values()), saved, equal])  # fmt: skip
    return table(["size", "variant", "M params", "FLOPs", "loss (seeds)", "minus full", "minus sliding",
                  "tokens saved", "minus full of equal FLOPs"], body)  # fmt: skip


def by_size(rows: list[Row], variant: str, base: str, value: Any = lambda row: row["loss"]) -> list[list[float]]:
    return [differences([r for r in rows if r["size"] == size], variant, base, value) for size in SIZES]


def pairs_spread(rows: list[Row], value: Any = lambda row: row["loss"]) -> tuple[float, int]:
    """One spread for differences within pairs, of all sizes and variants: few seeds tell little about each."""
    return common_spread([g for v in CORE[1:] for g in by_size(rows, v, "full", value) if g])


def overall(rows: list[Row]) -> str:
    """Differences over all sizes, each with the same weight."""
    body = []
    for variant in CORE[1:]:
        line = [variant]
        for base in ("full", "sliding", "deeper"):
            found = paired(by_size(rows, variant, base), pairs_spread(rows)) if variant != base else None
            line.append(str(found or ""))
        body.append(line)
    return table(["variant", "minus full", "minus sliding", "minus deeper"], body)


def exponents(rows: list[Row]) -> str:
    found = [(v, exponent(rows, v)) for v in CORE]
    return table(["variant", "exponent in N, E = 0"], [[v, str(e)] for v, e in found if e is not None])


def rates(done: list[Row]) -> str:
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    wanted = {row["steps"] for row in done if row["group"] == "rates"}
    for row in done:
        if row["size"] == "s" and row["batch"] == 16 and row["steps"] in wanted and row["group"] != "speed":
            cells[row["variant"]][row["peak_lr"]].append(row["loss"])
    columns = sorted({lr for found in cells.values() for lr in found})
    body = [[v, *(f"{statistics.mean(found[lr]):.4f} ({len(found[lr])})" if lr in found else "" for lr in columns)]
            for v, found in cells.items() if len(found) > 1]  # fmt: skip
    return table(["variant", *(f"lr {lr:.2g}" for lr in columns)], body)


def ablations(rows: list[Row]) -> list[tuple[str, Mean, Mean, float]]:
    here = [row for row in rows if row["size"] == "s"]
    full = next((row for row in here if row["variant"] == "full"), None)
    found = []
    for variant in dict.fromkeys(row["variant"] for row in here):
        seeds = {row["seed"] for row in here if row["variant"] == variant}
        mine = [row for row in here if row["seed"] in seeds]
        to_full, to_sliding = differences(mine, variant, "full"), differences(mine, variant, "sliding")
        if variant != "full" and to_full and to_sliding and full:
            cost = next(r["flops"] for r in mine if r["variant"] == variant) / full["flops"]
            found.append((variant, mean(to_full), mean(to_sliding), cost))
    return sorted(found, key=lambda x: x[1].value)


def parts(rows: list[Row], name: str) -> str:
    """Differences from full by domain or by task, pooled over sizes, in nats per token."""
    field = {"domains": "loss", "answers": "nll_per_token"}[name]
    keys = sorted({k for row in rows for k in row.get(name, {})})
    rows = [row for row in rows if row.get(name)]
    body = []
    for part in keys:
        line = [part, f"{statistics.mean(r[name][part][field] for r in rows if r['variant'] == 'full'):.3f}"]

        def value(row: Row, part: str = part) -> float:
            return row[name][part][field]

        spread = pairs_spread(rows, value)
        for variant in CORE[1:]:
            line.append(str(paired(by_size(rows, variant, "full", value), spread) or ""))
        body.append(line)
    return table([name, "full", *CORE[1:]], body)


def speeds(done: list[Row]) -> str:
    alone = {(row["size"], row["variant"]): row for row in done if row["group"] == "speed"}
    body = []
    for size in SIZES:
        base = alone.get((size, "full"))
        for variant in CORE:
            row = alone.get((size, variant))
            if row and base:
                flops = row["flops"] / row["tokens"]
                body.append([size, variant, f"{flops / 1e6:.1f}", f"{row['tokens_per_second'] / 1e3:.0f}",
                             f"{flops * row['tokens_per_second'] / 1e12:.0f}",
                             f"{base['tokens_per_second'] / row['tokens_per_second']:.2f}"])  # fmt: skip
    return table(["size", "variant", "MFLOPs a token", "k tokens/s", "TFLOP/s", "time of full"], body)


def finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_core(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 4.0), dpi=150)
    spread = pairs_spread(rows)
    for i, variant in enumerate(CORE[1:]):
        for j, size in enumerate(SIZES):
            found = differences([r for r in rows if r["size"] == size], variant, "full")
            at = j + 0.17 * (i - 1.5)
            axes.plot([at] * len(found), found, "o", color=COLOURS[variant], alpha=0.45, markersize=3.5)
            m = paired([found], spread)
            if m is not None:
                label = variant if j == 0 else None
                axes.errorbar(
                    at, m.value, m.half, color=COLOURS[variant], marker="_", markersize=9, capsize=3, label=label
                )
    axes.axhline(0, color="black", linewidth=0.8)
    names = [next((f"{r['params_non_embedding'] / 1e6:.1f}M" for r in rows if r["size"] == s), s) for s in SIZES]
    axes.set_xticks(range(len(SIZES)), names)
    axes.set(xlabel="parameters without embeddings", ylabel="loss minus full attention, nats")
    axes.legend(frameon=False, fontsize=8)
    finish(axes, "16.4M tokens; pairs of one seed (dots), their means with 95% intervals of one common spread")
    figure.tight_layout()
    figure.savefig(path)


def plot_rates(done: list[Row], path: Path) -> None:
    steps = {row["steps"] for row in done if row["group"] == "rates"}
    wanted = [
        r for r in done if r["size"] == "s" and r["batch"] == 16 and r["steps"] in steps and r["group"] != "speed"
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=150)
    for variant in CORE[:4]:
        mine = [row for row in wanted if row["variant"] == variant and row["seed"] < 2]
        for axes in (left, right):
            values = {key(row): row["loss"] for row in mine}
            if axes is right:
                base = {key(r): r["loss"] for r in wanted if r["variant"] == "full"}
                values = {k: v - base[k] for k, v in values.items() if k in base}
            lr = {key(row): row["peak_lr"] for row in mine}
            points: dict[float, list[float]] = defaultdict(list)
            for k, v in values.items():
                points[lr[k]].append(v)
                axes.plot(lr[k], v, "o", color=COLOURS[variant], alpha=0.4, markersize=3)
            at = sorted(points)
            axes.plot(at, [statistics.mean(points[x]) for x in at], color=COLOURS[variant], label=variant)
    left.set(ylabel="validation loss, nats")
    right.set(ylabel="minus full attention, nats")
    for axes, title in (
        (left, "2.8M parameters, 8.2M tokens, seeds 0 and 1"),
        (right, "Differences of one seed and rate"),
    ):
        axes.set(xscale="log", xlabel="peak learning rate")
        axes.set_xticks([1.4e-3, 2.8e-3, 5.6e-3, 11.2e-3], ["1.4e-3", "2.8e-3", "5.6e-3", "11.2e-3"], fontsize=8)
        axes.minorticks_off()
        finish(axes, title)
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def plot_ablations(found: list[tuple[str, Mean, Mean, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 0.27 * len(found) + 1.2), dpi=150)
    for i, (_, m, _, _) in enumerate(reversed(found)):
        axes.barh(i, m.value, color="C0" if m.value < 0 else "C3", alpha=0.75)
    axes.set_yticks(
        range(len(found)), [f"{v} ({m.count}, FLOPs x{c:.2f})" for v, m, _, c in reversed(found)], fontsize=7
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("validation loss minus full attention, nats per token", fontsize=8)
    finish(axes, "2.8M parameters: mean over seeds (their number, FLOPs beside full attention)")
    figure.tight_layout()
    figure.savefig(path)


def plot_probes(rows: list[Row], path: Path) -> None:
    tasks = sorted({row["task"] for row in rows})
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.6), dpi=150, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        for variant in CORE:
            points: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if (row["task"], row["variant"]) == (task, variant):
                    points[row["examples"]].append(row["accuracy"])
            at = sorted(points)
            if at:
                means = [statistics.mean(points[n]) for n in at]
                low = [m - min(points[n]) for m, n in zip(means, at, strict=True)]
                high = [max(points[n]) - m for m, n in zip(means, at, strict=True)]
                axes.errorbar(
                    at, means, (low, high), color=COLOURS[variant], marker="o", markersize=3, capsize=2, label=variant
                )
        axes.axhline(next(r["chance"] for r in rows if r["task"] == task), color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(ylim=(0, 1.03), xlabel="training problems", ylabel="accuracy, held out")
        finish(axes, task)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="*")
    parser.add_argument("--probes", type=Path)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--plots", type=Path, required=True)
    args = parser.parse_args()
    sections: list[tuple[str, str]] = []
    if args.cells:
        done, others = read(args.cells)
        rows = main_length(done)
        found = ablations(rows)
        shown = [[v, str(m.count), f"{c:.2f}", str(m), str(s)] for v, m, s, c in found]
        sections = [
            ("Cells", f"{len(done)} finished; not finished: {[(r['name'], r['status']) for r in others]}\n"),
            ("Noise", noise(done)), ("Resolution", resolution(rows)), ("Rates", rates(done)),
            ("Core", core(rows, done)), ("All sizes", overall(rows)), ("Exponents", exponents(rows)),
            ("Ablations", table(["variant", "seeds", "FLOPs", "minus full", "minus sliding"], shown)),
            ("Domains", parts(rows, "domains")), ("Answers", parts(rows, "answers")), ("Speed", speeds(done)),
        ]  # fmt: skip
        plot_core(rows, args.plots / "token-efficiency.png")
        plot_rates(done, args.plots / "token-efficiency-rates.png")
        if len(found) > len(CORE):
            plot_ablations(found, args.plots / "token-efficiency-ablations.png")
    if args.probes:
        from sidlm.cli.scaling_probe import table as probe_table

        probes = [json.loads(line) for line in args.probes.read_text(encoding="utf-8").splitlines()]
        sections.append(("Probes", probe_table(probes) + "\n"))
        plot_probes(probes, args.plots / "probes.png")
    args.markdown.write_text("\n".join(f"## {title}\n\n{text}" for title, text in sections))


if __name__ == "__main__":
    main()

"""Tables and plots of the study of token efficiency, from its cells.

python benchmarks/token_report.py CELLS.jsonl [...] [--probes PROBES.jsonl] --markdown OUT.md --plots FOLDER
    [--core CORE.jsonl]

--core writes the rows that are compared across sizes and lengths, for `sid scaling fit` and `efficiency`. Intervals are
of 95%: of Student's t, with one spread of paired differences for all sizes and variants of a length.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from _token_statistics import (
    Mean,
    Row,
    at_equal_flops,
    common_spread,
    differences,
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
Groups = list[list[float]]


def read(paths: list[Path]) -> tuple[list[Row], list[Row]]:
    """(rows of losses, the last line of each cell that did not end well)."""
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    rows = {line["name"]: line for line in lines if "loss" in line}
    cells = {line["name"]: line for line in lines if "loss" not in line}
    return list(rows.values()), [cell for cell in cells.values() if cell["status"] != "done"]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def standard(rows: list[Row]) -> list[Row]:
    """Rows of the base rate and batch, no repeats, of the variants that are compared everywhere."""
    return [r for r in rows if r["lr"] == 1 and r["batch"] == 8 and not r["repeat"] and r["variant"] in CORE]


def lengths(rows: list[Row]) -> list[int]:
    return sorted({row["tokens"] for row in rows})


def millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M"


def of(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def noise(rows: list[Row]) -> str:
    """Full attention at s by length, batch and rate."""
    groups: dict[tuple[int, float, int], list[Row]] = defaultdict(list)
    for row in of(rows, variant="full", size="s", repeat=0):
        groups[row["batch"], row["lr"], row["tokens"]].append(row)
    body = []
    for (batch, _, tokens), found in sorted(groups.items()):
        values = [row["loss"] for row in sorted(found, key=lambda r: r["seed"])]
        middle = f"{statistics.mean(values):.4f}"
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        seeds = ", ".join(f"{v:.3f}" for v in values)
        body.append([str(batch), f"{found[0]['peak_lr']:.2g}", millions(tokens), middle, spread, seeds])
    return table(["rows a step", "peak lr", "tokens", "loss", "sd of seeds", "by seed"], body)


def by_size(rows: list[Row], variant: str, base: str, value: Any = lambda row: row["loss"]) -> Groups:
    return [differences(of(rows, size=size), variant, base, value) for size in SIZES]


def pairs_spread(rows: list[Row], value: Any = lambda row: row["loss"]) -> tuple[float, int]:
    """One spread for differences within pairs, of all sizes and variants: few seeds tell little about each."""
    return common_spread([g for v in CORE[1:] for g in by_size(rows, v, "full", value) if g])


def resolution(rows: list[Row]) -> str:
    """Spread of runs and of paired differences by length, and the seeds that 0.02 nats take."""
    body = []
    for tokens in lengths(rows):
        here = of(rows, tokens=tokens)
        losses = [[r["loss"] for r in of(here, size=s, variant=v)] for s in SIZES for v in CORE]
        alone, spread = common_spread([g for g in losses if g]), pairs_spread(here)
        if spread[1] and alone[1]:
            body.append([millions(tokens), f"{alone[0]:.4f} ({alone[1]})", f"{spread[0]:.4f} ({spread[1]})",
                         str(seeds_needed(spread[0], 0.02)), str(seeds_needed(spread[0], 0.01))])  # fmt: skip
    head = ["tokens", "sd of seeds (degrees of freedom)", "sd of paired differences", "seeds for ±0.02", "for ±0.01"]
    return table(head, body)


def paired(groups: Groups, spread: tuple[float, int]) -> Mean | None:
    """`pooled`, or None without a pair."""
    return pooled(groups, *spread) if any(groups) else None


def flops_groups(rows: list[Row], variant: str, base: str, tokens: int) -> Groups:
    return [at_equal_flops(rows, variant, base, size, tokens) for size in SIZES]


def core(rows: list[Row]) -> str:
    """Every size by itself at its longest length."""
    longest, body = max(lengths(rows)), []
    here = of(rows, tokens=longest)
    spread = pairs_spread(here)
    for size in SIZES:
        for variant in CORE:
            mine, full = of(here, size=size, variant=variant), of(here, size=size, variant="full")
            if not mine or not full:
                continue
            own = of(here, size=size)
            to = [paired([differences(own, variant, b)], spread) if b != variant else None for b in ("full", "sliding")]
            equal = (
                paired([at_equal_flops(rows, variant, "full", size, longest)], spread) if variant != "full" else None
            )
            steep = slope(rows, size)
            saved = "{:+.0%} ({:+.0%} to {:+.0%})".format(*tokens_saved(to[0], steep)) if to[0] and steep else ""
            body.append([size, variant, f"{mine[0]['params_non_embedding'] / 1e6:.2f}",
                         f"{mine[0]['flops'] / full[0]['flops']:.3f}",
                         f"{statistics.mean(r['loss'] for r in mine):.4f} ({len(mine)})",
                         *(str(m or "") for m in to), saved, str(equal or "")])  # fmt: skip
    return table(["size", "variant", "M params", "FLOPs", "loss (seeds)", "minus full", "minus sliding", "tokens saved",
                  "minus full of equal FLOPs"], body)  # fmt: skip


def comparisons(rows: list[Row]) -> dict[tuple[str, str, int], Mean]:
    """(variant, against what, tokens) -> mean over sizes of the difference; "full, equal FLOPs" is one of the bases."""
    found = {}
    for tokens in lengths(rows):
        here = of(rows, tokens=tokens)
        spread = pairs_spread(here)
        for variant in CORE[1:]:
            for base in ("full", "sliding", "deeper"):
                m = paired(by_size(here, variant, base), spread) if variant != base else None
                if m is not None:
                    found[variant, base, tokens] = m
            m = paired(flops_groups(rows, variant, "full", tokens), spread)
            if m is not None:
                found[variant, "full, equal FLOPs", tokens] = m
    return found


def overall(rows: list[Row]) -> str:
    """Differences over all sizes, each size with the same weight, at every length."""
    found, bases = comparisons(rows), ("full", "full, equal FLOPs", "sliding", "deeper")
    body = [[v, millions(n), *(str(found.get((v, b, n), "")) for b in bases)] for v in CORE[1:] for n in lengths(rows)]
    return table(["variant", "tokens", *(f"minus {b}" for b in bases)], [row for row in body if any(row[2:])])


def fits(path: Path, plot: Path) -> str:
    """The law of each variant, what differs from full attention, and the frontier; of the file of the core's rows."""
    from sidlm.errors import SidError
    from sidlm.scaling.cells import read_cells
    from sidlm.scaling.efficiency import frontier
    from sidlm.scaling.fit import compare, fit_all, verdict

    try:
        found = fit_all(read_cells(path, params="params_non_embedding"))
    except SidError as error:
        return f"No fit: {error}\n"
    plot_exponents({name: fit.as_dict() for name, fit in found.items()}, plot)
    body = []
    for name, fit in found.items():
        facts: dict[str, Any] = fit.as_dict()
        spans = ["{:.3f} ({:.3f} to {:.3f})".format(facts[k], *facts[f"{k}_ci"]) for k in ("E", "alpha", "beta")]
        words = verdict(compare(found["full"], fit)) if name != "full" else ""
        body.append([name, *spans, f"{100 * facts['rms_log_residual']:.2f}%", words])
    text = table(["variant", "E", "alpha", "beta", "rms residual", "against full"], body) + "\n"
    body = []
    for name, fit in found.items():
        for point in frontier(found["full"], fit) if name != "full" else ():
            gap, ratio = point["loss_at_equal_flops"], point["flops"]
            ci = " to ".join("never" if x is None else f"{x:.2f}" for x in ratio["ci"])
            value = "never" if ratio["ratio"] is None else f"{ratio['ratio']:.2f}"
            body.append([name, f"{point['budget']:.2g}", f"{point['params'] / 1e6:.2f}M" + "*" * (not point["inside"]),
                         "{:+.4f} ({:+.4f} to {:+.4f})".format(gap["difference"], *gap["ci"]),
                         f"{value} ({ci})"])  # fmt: skip
    return text + table(["variant", "FLOPs", "its best size", "loss minus full's", "FLOPs needed, full = 1"], body)


def rates(rows: list[Row]) -> str:
    wanted = {row["tokens"] for row in rows if row["group"] == "rates"}
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in of(rows, size="s", batch=8, repeat=0):
        if row["tokens"] in wanted and row["seed"] < 3:
            cells[row["variant"]][row["peak_lr"]].append(row["loss"])
    columns = sorted({lr for found in cells.values() if len(found) > 1 for lr in found})
    body = [[v, *(f"{statistics.mean(found[lr]):.4f} ({len(found[lr])})" if lr in found else "" for lr in columns)]
            for v, found in cells.items() if len(found) > 1]  # fmt: skip
    return table(["variant", *(f"lr {lr:.2g}" for lr in columns)], body)


def ablations(rows: list[Row]) -> list[tuple[str, dict[str, Mean | None], float]]:
    """(variant, differences, FLOPs beside full) at s, at the length of the ablations, least first."""
    tokens = max((row["tokens"] for row in rows if row["group"] == "ablation"), default=0)
    every = of(rows, size="s", lr=1, batch=8, repeat=0)
    here = [row for row in every if row["tokens"] == tokens and row["seed"] < 3]
    names = [v for v in dict.fromkeys(row["variant"] for row in here) if v != "full"]
    spread = common_spread([g for v in names if (g := differences(here, v, "full"))])
    full, found = of(here, variant="full"), []
    for variant in names:
        to = {b: paired([differences(here, variant, b)], spread) for b in ("full", "sliding") if b != variant}
        to["equal FLOPs"] = paired([at_equal_flops(every, variant, "full", "s", tokens)], spread)
        if to["full"] is not None:
            found.append((variant, to, of(here, variant=variant)[0]["flops"] / full[0]["flops"]))
    return sorted(found, key=lambda x: x[1]["full"].value if x[1]["full"] else 0.0)


def ablation_table(found: list[tuple[str, dict[str, Mean | None], float]]) -> str:
    body = [
        [variant, str(to["full"].count if to["full"] else 0), f"{cost:.2f}",
         *(str(to.get(b) or "") for b in ("full", "equal FLOPs", "sliding"))]
        for variant, to, cost in found
    ]  # fmt: skip
    return table(["variant", "seeds", "FLOPs", "minus full", "minus full, equal FLOPs", "minus sliding"], body)


def parts(rows: list[Row], name: str) -> str:
    """Differences from full by domain or by task, pooled over sizes, in nats per token, at the longest length."""
    field = {"domains": "loss", "answers": "nll_per_token"}[name]
    rows = [row for row in of(rows, tokens=max(lengths(rows))) if row.get(name)]
    body = []
    for part in sorted({k for row in rows for k in row[name]}):

        def value(row: Row, part: str = part) -> float:
            return row[name][part][field]

        spread = pairs_spread(rows, value)
        line = [part, f"{statistics.mean(value(r) for r in rows if r['variant'] == 'full'):.3f}"]
        body.append([*line, *(str(paired(by_size(rows, v, "full", value), spread) or "") for v in CORE[1:])])
    return table([name, "full", *CORE[1:]], body)


def seconds(rows: list[Row]) -> str:
    """Seconds of cells beside those of full attention of the same size, at the first length."""
    body = []
    for size in SIZES:
        first = {v: min((r["seconds"] for r in of(rows, size=size, variant=v, tokens=min(lengths(rows)))), default=0.0)
                 for v in CORE}  # fmt: skip
        if first["full"]:
            body.append([size, f"{first['full']:.0f}", *(f"{first[v] / first['full']:.2f}" for v in CORE[1:])])
    return table(["size", "full, s", *CORE[1:]], body)


def finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_core(rows: list[Row], path: Path) -> None:
    """Differences by size at the longest length: at equal tokens, and at equal FLOPs."""
    longest = max(lengths(rows))
    here = of(rows, tokens=longest)
    spread = pairs_spread(here)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.0), dpi=150, sharey=True)
    kinds: list[tuple[str, Callable[[str, str], list[float]]]] = [
        ("equal tokens", lambda v, s: differences(of(here, size=s), v, "full")),
        ("equal FLOPs", lambda v, s: at_equal_flops(rows, v, "full", s, longest)),
    ]
    for axes, (title, found_of) in zip(panels, kinds, strict=True):
        for i, variant in enumerate(CORE[1:]):
            for j, size in enumerate(SIZES):
                found, at = found_of(variant, size), j + 0.17 * (i - 1.5)
                axes.plot([at] * len(found), found, "o", color=COLOURS[variant], alpha=0.4, markersize=3)
                m = paired([found], spread)
                if m is not None:
                    axes.errorbar(at, m.value, m.half, color=COLOURS[variant], marker="_", markersize=9, capsize=3,
                                  label=variant if j == 0 else None)  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        names = [next((f"{r['params_non_embedding'] / 1e6:.1f}M" for r in of(here, size=s)), s) for s in SIZES]
        axes.set_xticks(range(len(SIZES)), names)
        axes.set_xlabel("parameters without embeddings")
        finish(axes, f"{title}, {millions(longest)} tokens")
    panels[0].set_ylabel("loss minus full attention, nats")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def plot_lengths(rows: list[Row], path: Path) -> None:
    """Over all sizes, by length: the variants against full attention at equal tokens and FLOPs, and against sliding."""
    found = comparisons(rows)
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.8), dpi=150, sharey=True)
    for axes, base in zip(panels, ("full", "full, equal FLOPs", "sliding"), strict=True):
        for i, variant in enumerate(CORE[1:]):
            points = [
                (n * 1.05 ** (i - 1.5), found[variant, base, n]) for n in lengths(rows) if (variant, base, n) in found
            ]
            if points:
                axes.errorbar([x for x, _ in points], [m.value for _, m in points], [m.half for _, m in points],
                              color=COLOURS[variant], marker="o", markersize=4, capsize=3, linewidth=1.2,
                              label=variant)  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths(rows), [millions(n) for n in lengths(rows)])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        finish(axes, f"minus {base}")
    panels[0].set_ylabel("nats per token, mean of all sizes")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def plot_exponents(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.4), dpi=150, sharey=True)
    for axes, name, of_what in zip(panels, ("alpha", "beta"), ("parameters", "tokens"), strict=True):
        for i, (variant, facts) in enumerate(found.items()):
            low, high = facts[f"{name}_ci"]
            axes.errorbar(facts[name], i, xerr=[[facts[name] - low], [high - facts[name]]], color=COLOURS[variant],
                          marker="o", markersize=4, capsize=3)  # fmt: skip
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        finish(axes, f"exponent of {of_what}, {name}, with its 95% interval")
    figure.tight_layout()
    figure.savefig(path)


def plot_ablations(found: list[tuple[str, dict[str, Mean | None], float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.6, 0.27 * len(found) + 1.2), dpi=150)
    for i, (_, to, _) in enumerate(reversed(found)):
        for m, colour, shift in ((to["full"], "C0", 0.1), (to["equal FLOPs"], "C1", -0.15)):
            if m is not None:
                axes.errorbar(m.value, i + shift, xerr=m.half, color=colour, marker="o", markersize=3.5, capsize=2,
                              linewidth=1)  # fmt: skip
    labels = [f"{v} ({to['full'].count if to['full'] else 0}, FLOPs x{c:.2f})" for v, to, c in reversed(found)]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot([], [], "o-", color="C0", label="equal tokens")
    axes.plot([], [], "o-", color="C1", label="equal FLOPs")
    axes.legend(frameon=False, fontsize=7)
    axes.set_xlabel("validation loss minus full attention, nats per token", fontsize=8)
    finish(axes, "size s: (seeds, FLOPs beside full attention)")
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


def write_core(rows: list[Row], path: Path) -> None:
    """The rows of seeds that every size, length and variant has, as `sid scaling fit` takes them."""
    every: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for row in rows:
        every[row["size"], row["variant"]].add((row["seed"], row["tokens"]))
    whole = {v for v in CORE if all((s, v) in every for s in SIZES)}
    shared = set.intersection(*(every[s, v] for s in SIZES for v in whole)) if whole else set()
    seeds = {seed for seed, _ in shared}
    full = [n for n in lengths(rows) if all((seed, n) in shared for seed in seeds)]
    keep = (
        "variant",
        "size",
        "params",
        "params_non_embedding",
        "tokens",
        "seed",
        "loss",
        "flops",
        "domains",
        "answers",
    )
    ordered = sorted(rows, key=lambda r: (CORE.index(r["variant"]), r["params"], r["tokens"], r["seed"]))
    with path.open("w", encoding="utf-8") as file:
        for row in ordered:
            if row["variant"] in whole and row["seed"] in seeds and row["tokens"] in full:
                file.write(json.dumps({key: row[key] for key in keep if key in row}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="*")
    parser.add_argument("--probes", type=Path)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--plots", type=Path, required=True)
    parser.add_argument("--core", type=Path, default=Path("token_efficiency_core.jsonl"))
    args = parser.parse_args()
    sections: list[tuple[str, str]] = []
    if args.cells:
        every, others = read(args.cells)
        rows, found = standard(every), ablations(every)
        write_core(rows, args.core)
        fitted = fits(args.core, args.plots / "token-efficiency-exponents.png")
        sections = [
            ("Cells", f"{len(every)} rows; cells not finished: {[(r['name'], r['status']) for r in others]}\n"),
            ("Noise", noise(every)), ("Resolution", resolution(rows)), ("Rates", rates(every)), ("Core", core(rows)),
            ("All sizes", overall(rows)), ("Fits", fitted), ("Ablations", ablation_table(found)),
            ("Domains", parts(rows, "domains")), ("Answers", parts(rows, "answers")), ("Seconds", seconds(rows)),
        ]  # fmt: skip
        plot_core(rows, args.plots / "token-efficiency.png")
        plot_lengths(rows, args.plots / "token-efficiency-lengths.png")
        if found:
            plot_ablations(found, args.plots / "token-efficiency-ablations.png")
    if args.probes:
        from sidlm.cli.scaling_probe import table as probe_table

        probes = [json.loads(line) for line in args.probes.read_text(encoding="utf-8").splitlines()]
        sections.append(("Probes", probe_table(probes) + "\n"))
        plot_probes(probes, args.plots / "probes.png")
    args.markdown.write_text("\n".join(f"## {title}\n\n{text}" for title, text in sections))


if __name__ == "__main__":
    main()

"""Tables and plots of the study of token efficiency, from its cells.

python benchmarks/token_report.py CELLS.jsonl [...] [--probes PROBES.jsonl] --markdown OUT.md --plots FOLDER
    [--core CORE.jsonl]

--core writes the rows that are compared across sizes and lengths, for `sid scaling fit` and `efficiency`. Intervals are
of 95%: of Student's t, with one spread of paired differences for all sizes and variants of a length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import _token_plots as plots
import _token_search as tiny
from _token_compare import (
    CORE,
    SIZES,
    Ablation,
    ablations,
    by_size,
    compared,
    comparisons,
    lengths,
    main_length,
    millions,
    of,
    paired,
    pairs_spread,
    slopes,
    standard,
)
from _token_statistics import (
    Row,
    at_equal_flops,
    common_spread,
    differences,
    mean,
    seeds_needed,
    slope,
    tokens_saved,
)


def read(paths: list[Path]) -> tuple[list[Row], list[Row]]:
    """(rows of losses, the last line of each cell)."""
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    rows = {line["name"]: line for line in lines if "loss" in line}
    cells = {line["name"]: line for line in lines if "loss" not in line}
    return list(rows.values()), list(cells.values())


def table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


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


def core(rows: list[Row]) -> str:
    """Every size by itself at the longest length of all mixers."""
    longest, body = main_length(rows), []
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


def overall(rows: list[Row]) -> str:
    """Differences over sizes, each with the same weight, at every length."""
    found, bases, body = comparisons(rows), ("full", "full, equal FLOPs", "sliding", "deeper"), []
    for variant in CORE[1:]:
        for tokens in lengths(rows):
            line = [str(found.get((variant, b, tokens), "")) for b in bases]
            sizes = {row["size"] for row in compared(rows, tokens)}
            named = ", ".join(s for s in SIZES if s in sizes and of(rows, size=s, variant=variant, tokens=tokens))
            body += [[variant, millions(tokens), named, *line]] if any(line) else []
    return table(["variant", "tokens", "sizes", *(f"minus {b}" for b in bases)], body)


def local_exponents(rows: list[Row]) -> str:
    """-d ln L / d ln D and -d ln L / d ln N between neighbouring lengths and sizes, with E = 0, and what variants of a
    seed differ in."""
    steps: list[tuple[str, str, float, float]] = []
    body = []
    last = main_length(rows)
    for low, high in itertools.pairwise(lengths(rows)):
        for size in SIZES:
            steps.append(("D", size, low, high))
    for small, large in itertools.pairwise(SIZES):
        steps.append(("N", f"{small} to {large}", 0.0, 0.0))
    for kind, where, low, high in steps:
        found = {v: slopes(rows, v, kind, where, low, high, last) for v in CORE}
        base = found["full"]
        for variant, own in found.items():
            if len(own) > 1:
                gaps = [own[s] - base[s] for s in sorted(own.keys() & base.keys())]
                path = f"{millions(int(low))} to {millions(int(high))}" if kind == "D" else f"{millions(last)}"
                body.append([kind, where, path, variant, f"{mean(list(own.values())).value:.4f}",
                             str(mean(gaps)) if variant != "full" and len(gaps) > 1 else ""])  # fmt: skip
    return table(["of", "size", "tokens", "variant", "exponent", "minus full's"], body)


def fits(path: Path) -> str:
    """The law of each variant, what differs from full attention, and the frontier; of the file of the core's rows."""
    from sidlm.errors import SidError
    from sidlm.scaling.cells import read_cells
    from sidlm.scaling.efficiency import frontier
    from sidlm.scaling.fit import compare, fit_all, verdict

    try:
        found = fit_all(read_cells(path, params="params_non_embedding"))
    except SidError as error:
        return f"No fit: {error}\n"
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
        if row["tokens"] in wanted and row["seed"] < 4:
            cells[row["variant"]][row["peak_lr"]].append(row["loss"])
    columns = sorted({lr for found in cells.values() if len(found) > 1 for lr in found})
    body = [[v, *(f"{statistics.mean(found[lr]):.4f} ({len(found[lr])})" if lr in found else "" for lr in columns)]
            for v, found in cells.items() if len(found) > 1]  # fmt: skip
    return table(["variant", *(f"lr {lr:.2g}" for lr in columns)], body)


def ablation_table(found: list[Ablation]) -> str:
    body = [
        [variant, str(to["full"].count if to["full"] else 0), f"{cost:.2f}",
         *(str(to.get(b) or "") for b in ("full", "equal FLOPs", "sliding"))]
        for variant, to, cost in found
    ]  # fmt: skip
    return table(["variant", "seeds", "FLOPs", "minus full", "minus full, equal FLOPs", "minus sliding"], body)


def search(rows: list[Row]) -> str:
    """All that was searched, at its longest length."""
    searched = [row["tokens"] for row in rows if row["group"] == "search"]
    return table(tiny.SEARCH_HEAD, tiny.search_lines(rows, "s", max(searched)) if searched else [])


def tiny_sections(rows: list[Row]) -> list[tuple[str, str]]:
    """What tiny windows save, their domains, answers and exponents, at the longest length they have at m and l."""
    found = {row["tokens"] for row in rows if row["group"] == "cheap"}
    if not found:
        return []
    pairs = itertools.product(("determinant (32,4)", "determinant (64,8)", "sliding 32"), ("full", "sliding 32"))
    saved = [line for v, base in pairs if v != base for line in tiny.saved_lines(rows, v, base)]
    last, fields = max(found), {"domains": "loss", "answers": "nll_per_token"}
    made = [(f"Tiny: {k}", table([k, *tiny.PART_HEAD], tiny.part_lines(rows, k, f, last))) for k, f in fields.items()]
    slopes = table(tiny.SLOPE_HEAD, tiny.slope_lines(rows, min(found), last))
    return [("Saved", table(tiny.SAVED_HEAD, saved)), *made, ("Tiny: exponents", slopes)]


def parts(rows: list[Row], name: str) -> str:
    """Differences from full by domain or by task, pooled over sizes, in nats per token, at the longest length."""
    field = {"domains": "loss", "answers": "nll_per_token"}[name]
    rows = [row for row in rows if row.get(name)]
    rows = compared(rows, main_length(rows) if of(rows, variant="determinant") else max(lengths(rows)))
    body = []
    for part in sorted({k for row in rows for k in row[name]}):

        def value(row: Row, part: str = part) -> float:
            return row[name][part][field]

        spread = pairs_spread(rows, value)
        line = [part, f"{statistics.mean(value(r) for r in rows if r['variant'] == 'full'):.3f}"]
        body.append([*line, *(str(paired(by_size(rows, v, "full", value), spread) or "") for v in CORE[1:])])
    return table([name, "full", *CORE[1:]], body)


def seconds(rows: list[Row]) -> str:
    """Seconds of cells beside those of full attention of the same size, at the longest length of all mixers."""
    body, tokens = [], main_length(rows)
    for size in SIZES:
        first = {
            v: min((r["seconds"] for r in of(rows, size=size, variant=v, tokens=tokens)), default=0.0) for v in CORE
        }
        if first["full"]:
            ratios = [f"{first[v] / first['full']:.2f}" if first[v] else "" for v in CORE[1:]]
            body.append([size, f"{first['full']:.0f}", *ratios])
    return table(["size", "full, s", *CORE[1:]], body)


def write_core(rows: list[Row], path: Path) -> None:
    """Rows as `sid scaling fit` takes them: the lengths and seeds that variants share at three sizes or more."""
    sizes = {v: {row["size"] for row in of(rows, variant=v)} for v in CORE}
    whole = [v for v in CORE if len(sizes[v]) >= 3]
    places = {v: {(r["size"], r["tokens"], r["seed"]) for r in of(rows, variant=v)} for v in whole}
    shared = set.intersection(*places.values()) if places else set()
    seeds = {seed for *_, seed in shared}
    shared = {place for place in shared if all((*place[:2], seed) in shared for seed in seeds)}
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
            if row["variant"] in whole and (row["size"], row["tokens"], row["seed"]) in shared:
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
        every, cells = read(args.cells)
        others = [cell for cell in cells if cell["status"] != "done"]
        rows, found = standard(every), ablations(every)
        write_core(rows, args.core)
        plots.plot_exponents(rows, args.plots / "token-efficiency-exponents.png")
        plots.plot_training(cells, args.plots / "token-efficiency-training.png")
        sections = [
            ("Cells", f"{len(every)} rows; cells not finished: {[(r['name'], r['status']) for r in others]}\n"),
            ("Noise", noise(every)), ("Resolution", resolution(rows)), ("Rates", rates(every)), ("Core", core(rows)),
            ("All sizes", overall(rows)), ("Local exponents", local_exponents(rows)), ("Fits", fits(args.core)),
            ("Ablations", ablation_table(found)), ("Search", search(every)),
            ("Tiny windows", table(tiny.CHOSEN_HEAD, tiny.chosen_lines(every))), *tiny_sections(every),
            ("Domains", parts(rows, "domains")), ("Answers", parts(rows, "answers")), ("Seconds", seconds(rows)),
        ]  # fmt: skip
        plots.plot_core(rows, args.plots / "token-efficiency.png")
        plots.plot_lengths(rows, args.plots / "token-efficiency-lengths.png")
        if any(row["group"] == "cheap" for row in every):
            plots.plot_tiny(every, args.plots / "token-efficiency-tiny.png")
        if found:
            plots.plot_ablations(found, args.plots / "token-efficiency-ablations.png")
    if args.probes:
        from sidlm.cli.scaling_probe import table as probe_table

        probes = [json.loads(line) for line in args.probes.read_text(encoding="utf-8").splitlines()]
        sections.append(("Probes", probe_table(probes) + "\n"))
        plots.plot_probes(probes, args.plots / "probes.png")
    args.markdown.write_text("\n".join(f"## {title}\n\n{text}" for title, text in sections))


if __name__ == "__main__":
    main()

"""The figures of the study of token efficiency."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from _token_compare import (
    CORE,
    SIZES,
    Ablation,
    comparisons,
    lengths,
    main_length,
    millions,
    of,
    paired,
    pairs_spread,
    slopes,
)
from _token_search import FIRST, against, plain
from _token_statistics import Row, at_equal_flops, differences, mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {name: f"C{i}" for i, name in enumerate(CORE)}


def finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_variants(axes: Any, rows: list[Row]) -> None:
    for variant in CORE[1:]:
        if of(rows, variant=variant):
            axes.plot([], [], "-", color=COLOURS[variant], label=variant)
    axes.legend(frameon=False, fontsize=8)


def plot_core(rows: list[Row], path: Path) -> None:
    """Differences by size at the longest length of all mixers: at equal tokens, and at equal FLOPs."""
    longest = main_length(rows)
    here = of(rows, tokens=longest)
    spread, sizes = pairs_spread(here), [s for s in SIZES if of(here, size=s, variant="full")]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.0), dpi=150, sharey=True)
    kinds: list[tuple[str, Callable[[str, str], list[float]]]] = [
        ("equal tokens", lambda v, s: differences(of(here, size=s), v, "full")),
        ("equal FLOPs", lambda v, s: at_equal_flops(rows, v, "full", s, longest)),
    ]
    for axes, (title, found_of) in zip(panels, kinds, strict=True):
        for i, variant in enumerate(CORE[1:]):
            for j, size in enumerate(sizes):
                found, at = found_of(variant, size), j + 0.17 * (i - 1.5)
                axes.plot([at] * len(found), found, "o", color=COLOURS[variant], alpha=0.4, markersize=3)
                m = paired([found], spread)
                if m is not None:
                    axes.errorbar(at, m.value, m.half, color=COLOURS[variant], marker="_", markersize=9, capsize=3)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(sizes)), [f"{of(here, size=s)[0]['params_non_embedding'] / 1e6:.1f}M" for s in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xlabel("parameters without embeddings")
        finish(axes, f"{title}, {millions(longest)} tokens")
    panels[0].set_ylabel("loss minus full attention, nats")
    label_variants(panels[0], rows)
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
        axes.set_xlim(lengths(rows)[0] / 1.3, lengths(rows)[-1] * 1.3)
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        finish(axes, f"minus {base}")
    panels[0].set_ylabel("nats per token, mean of sizes")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def plot_exponents(rows: list[Row], path: Path) -> None:
    """Local exponents of tokens minus those of full attention of the same seed, by size and length."""
    sizes = [s for s in SIZES if of(rows, size=s, variant="full")]
    steps = list(itertools.pairwise(lengths(rows)))
    figure, panels = plt.subplots(1, len(sizes), figsize=(3.6 * len(sizes), 3.4), dpi=150, sharey=True, squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        for i, variant in enumerate(CORE[1:]):
            for j, (low, high) in enumerate(steps):
                own, base = (slopes(rows, v, "D", size, low, high, 0) for v in (variant, "full"))
                gaps = [own[s] - base[s] for s in sorted(own.keys() & base.keys())]
                if len(gaps) > 1:
                    m = mean(gaps)
                    axes.errorbar(j + 0.15 * (i - 1.5), m.value, m.half, color=COLOURS[variant], marker="o",
                                  markersize=4, capsize=3)  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(steps)), [f"{millions(low)}\nto {millions(high)}" for low, high in steps], fontsize=8)
        axes.set_xlim(-0.5, len(steps) - 0.5)
        finish(axes, f"size {size}")
    label_variants(panels[0][0], rows)
    panels[0][0].set_ylabel("exponent of tokens minus full's")
    figure.tight_layout()
    figure.savefig(path)


def plot_training(cells: list[Row], path: Path) -> None:
    """Training loss minus full attention's on the same batches, at the constant rate, with intervals over the seeds."""
    curves = {
        (cell["size"], cell["variant"]): {p["step"]: p["train"] for p in cell["curve"] if not p["decayed"]}
        for cell in cells
        if cell["group"] == "core" and cell["curve"]
    }
    sizes = [s for s in SIZES if (s, "full") in curves]
    figure, panels = plt.subplots(1, len(sizes), figsize=(3.9 * len(sizes), 3.6), dpi=150, sharey=True, squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        base = curves[size, "full"]
        for variant in CORE[1:]:
            own = curves.get((size, variant), {})
            shared = sorted(step for step in own.keys() & base.keys() if step > 64)
            gaps = [mean([a - b for a, b in zip(own[step], base[step], strict=True)]) for step in shared]
            at = [step * 8192 / 1e6 for step in shared]
            if gaps:
                axes.plot(at, [m.value for m in gaps], color=COLOURS[variant], linewidth=1.3, label=variant)
                low, high = ([m.value + sign * m.half for m in gaps] for sign in (-1, 1))
                axes.fill_between(at, low, high, color=COLOURS[variant], alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="million tokens", ylim=(-0.08, 0.06))
        finish(axes, f"size {size}")
    panels[0][0].set_ylabel("training loss minus full attention, nats")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def plot_ablations(found: list[Ablation], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.6, 0.27 * len(found) + 1.2), dpi=150)
    for i, (_, to, _) in enumerate(reversed(found)):
        for m, colour, shift in ((to["full"], "C0", 0.1), (to["equal FLOPs"], "C1", -0.15)):
            if m is not None:
                axes.errorbar(m.value, i + shift, xerr=m.half, color=colour, marker="o", markersize=3.5, capsize=2,
                              linewidth=1)  # fmt: skip
    labels = [f"{v} ({to['full'].count if to['full'] else 0}, FLOPs x{c:.2f})" for v, to, c in reversed(found)]
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.set_ylim(-1, len(found))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot([], [], "o-", color="C0", label="equal tokens")
    axes.plot([], [], "o-", color="C1", label="equal FLOPs")
    axes.legend(frameon=False, fontsize=7)
    axes.set_xlabel("validation loss minus full attention, nats per token", fontsize=8)
    finish(axes, "size s: (seeds, FLOPs beside full attention)")
    figure.tight_layout()
    figure.savefig(path)


def plot_tiny(rows: list[Row], path: Path) -> None:
    """Tiny windows by length and size, at equal FLOPs: against full attention and against sliding attention over 32."""
    rows = [row for row in plain(rows) if row["seed"] in FIRST]
    names = ("sliding", "sliding 32", "determinant", "determinant (64,8)", "determinant (32,4)")
    sizes, bases = ("s", "m", "l"), ("full", "sliding 32")
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.6), dpi=150, sharey="row")
    for line, base in zip(panels, bases, strict=True):
        for axes, size in zip(line, sizes, strict=True):
            for i, variant in enumerate(names):
                at = [n for n in lengths(of(rows, size=size, variant=variant)) if n < 8e6]
                points = [(n, m) for n in at if (m := against(rows, variant, base, size, n)[1]) is not None]
                if points:
                    axes.errorbar([n * 1.03 ** (i - 2) for n, _ in points], [m.value for _, m in points],
                                  [m.half for _, m in points], color=f"C{i}", marker="o", markersize=4, capsize=3,
                                  linewidth=1.2)  # fmt: skip
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            ticks = [n for n in lengths(rows) if n < 8e6]
            axes.set_xticks(ticks, [millions(n) for n in ticks])
            axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
            axes.minorticks_off()
            axes.set_xlabel("tokens")
            finish(axes, f"size {size}, minus {base} at equal FLOPs")
        line[0].set_ylabel("nats per token")
    for i, variant in enumerate(names):
        panels[0][0].plot([], [], "o-", color=f"C{i}", markersize=4, label=variant)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path)


def plot_probes(rows: list[Row], path: Path) -> None:
    tasks = sorted({row["task"] for row in rows})
    rows_of_panels, columns = -(-len(tasks) // 3), min(3, len(tasks))
    size = (3.4 * columns, 2.9 * rows_of_panels)
    figure, grid = plt.subplots(rows_of_panels, columns, figsize=size, dpi=150, squeeze=False)
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
                axes.errorbar(at, means, (low, high), color=COLOURS[variant], marker="o", markersize=3, capsize=2)
        axes.axhline(next(r["chance"] for r in rows if r["task"] == task), color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(ylim=(0, 1.03), xlabel="training problems", ylabel="accuracy, held out")
        finish(axes, task)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    for variant in CORE:
        grid[0][-1].plot([], [], "o-", color=COLOURS[variant], markersize=3, label=variant)
    grid[0][-1].legend(frameon=False, fontsize=7, ncols=2, loc="lower left")
    figure.tight_layout()
    figure.savefig(path)

"""Table, Markdown, plot and crossovers of benchmarks/sparse24.py, all from its rows alone."""

from pathlib import Path

OURS = "sidlm 2:4"
PACKED, MIXED, UNPACKED = (f"{OURS} {x}" for x in ("packed", "weights dense", "unpacked"))
PEAK_GB_S = {"NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350}
HEADER = f"{'model':<9}{'what':<30}{'precision':<10}{'variant':<24}{'T':>6}{'zeros':>7}{'ms':>10}{'':>14}"


def _name(row: dict) -> str:
    return f"{row['kind']} {row['what']}".strip()


def line(row: dict) -> str:
    """One row of the table."""
    text = f"{row['model']:<9}{_name(row):<30}{row['precision']:<10}{row['variant']:<24}{row['T']:>6}"
    if row["status"] != "ok":
        first = row.get("error", "").splitlines()
        return f"{text}  {row['status']}{': ' + first[0][:110] if first else ''}"
    if "ms" not in row:
        return text
    text += f"{row['zeros']:>7.1%}{row['ms']:>10.4f}"
    if "gb_s" in row:
        text += f"{row['gb_s']:>9.0f} GB/s"
    elif "tflops" in row:
        text += f"{row['tflops']:>6.0f} TFLOP/s"
    if "speedup" in row:
        text += f"  {row['speedup']:.2f}x {row['over']}"
    if "difference" in row:
        text += f"  differs by {row['difference']:.1e}"
    return text + ("  (calls)" if row.get("timed") == "calls" else "")


def _measured(results: dict, kind: str) -> list[dict]:
    return [row for row in results["rows"] if row["kind"] == kind and row["status"] == "ok" and "ms" in row]


MARGIN = 0.99
"""Of the slower time: what is not faster by more is not preferred."""


def _from(points: list[tuple[int, bool]]) -> int | None:
    """The fewest tokens of those measured from which on it is true for all; None if it is not for the most."""
    found = None
    for tokens, true in sorted(points, reverse=True):
        if not true:
            break
        found = tokens
    return found


def crossovers(results: dict) -> list[dict]:
    """For each layer the fewest tokens measured from which on 2:4 is faster than dense, forward and as a step; and from
    which on it is faster with packed activations forward ("inference") and as a step ("tokens") and, besides, with
    sparse products for the gradients of weights ("weights"). "tokens" is what its sparse forms, the better of two, make
    of the one without.
    """
    layers, times = {}, {"forward": {}, "step": {}}
    for kind in ("forward", "step"):
        for row in _measured(results, kind):
            if row["density"] != 0.1:
                continue
            key = (row["precision"], row["model"], row["d"], row["F"])
            times[kind].setdefault(key, {}).setdefault(row["T"], {})[row["variant"]] = row["ms"]
            if row["variant"] == OURS and "speedup" in row:
                layers.setdefault(key, {}).setdefault(kind, []).append((row["T"], row["speedup"] > 1))
    for key, kinds in layers.items():
        forward = {T: ms for T, ms in times["forward"].get(key, {}).items() if {PACKED, UNPACKED} <= set(ms)}
        if forward:
            kinds["inference"] = [(T, ms[PACKED] < MARGIN * ms[UNPACKED]) for T, ms in forward.items()]
        step = {T: ms for T, ms in times["step"].get(key, {}).items() if {PACKED, MIXED, UNPACKED} <= set(ms)}
        if step:
            better = [(T, min(ms[PACKED], ms[MIXED]) < MARGIN * ms[UNPACKED]) for T, ms in step.items()]
            kinds |= {"tokens": better, "weights": [(T, ms[PACKED] < MARGIN * ms[MIXED]) for T, ms in step.items()]}
    return [
        dict(zip(("precision", "model", "d", "F"), key, strict=True)) | {kind: _from(x) for kind, x in kinds.items()}
        for key, kinds in layers.items()
    ]


def entries(results: dict) -> list[str]:
    """Lines for src/sidlm/ops/sparse24/crossover.py."""
    device, lines = results["runs"][-1]["device"], []
    for row in results["crossovers"]:
        if {"inference", "tokens"} <= set(row):
            # gradients of weights are sparse only where activations are packed
            inference, tokens, weights = (row[name] or "NEVER" for name in ("inference", "tokens", "weights"))
            if "NEVER" not in (tokens, weights):
                weights = max(tokens, weights)
            sizes = f"{row['F']}, {row['d']}, {inference}, {tokens}, {'NEVER' if tokens == 'NEVER' else weights}"
            lines.append(f'    Crossover("{device}", {row["precision"] == "fp8"}, {sizes}),')
    return lines


def tables(results: dict) -> str:
    """Markdown: layers, products and packings."""
    facts = results["runs"][-1]
    out = [
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, cuSPARSELt {facts['cusparselt']}, "
        f"revision {facts['git_revision']}, {facts['date']}; copy {facts['copy_gb_s']:.0f} GB/s.",
        f"`{facts['command']}`",
    ]
    for kind, title in (("forward", "Layer, forward"), ("step", "Layer, forward and backward"), ("gemm", "Products")):
        rows = _measured(results, kind)
        if rows:
            out += [
                "",
                f"### {title}",
                "",
                "| model | T | what | precision | zeros | variant | ms | TFLOP/s | speed-up |",
            ]
            out.append("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            speed = f"{row['speedup']:.2f} over {row['over']}" if "speedup" in row else ""
            rate = f"{row['tflops']:.0f}" if "tflops" in row else ""
            out.append(
                f"| {row['model']} | {row['T']} | {row['what']} | {row['precision']} | {row['zeros']:.1%} "
                f"| {row['variant']} | {row['ms']:.3f} | {rate} | {speed} |"
            )
    rows = _measured(results, "pack")
    if rows:
        out += [
            "",
            "### Packing",
            "",
            "| model | T | what | precision | variant | ms | GB/s | of a copy | of the peak |",
        ]
        out.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        run = results["runs"][row["run"]]
        peak = PEAK_GB_S.get(run["device"])
        share = f"{row['gb_s'] / peak:.0%}" if peak else ""
        out.append(
            f"| {row['model']} | {row['T']} | {row['what']} | {row['precision']} | {row['variant']} | {row['ms']:.3f} "
            f"| {row['gb_s']:.0f} | {row['gb_s'] / run['copy_gb_s']:.0%} | {share} |"
        )
    if results["crossovers"]:
        out += ["", "### Fewest tokens from which on 2:4 is faster", ""]
        out += ["| model | precision | forward | step | packed, forward | packed, step | sparse gradients of weights |"]
        out += ["|---|---|---|---|---|---|---|"]
    for row in results["crossovers"]:
        sizes = [
            row.get(kind, "") or ("never" if kind in row else "")
            for kind in ("forward", "step", "inference", "tokens", "weights")
        ]
        out.append("| {} | {} | {} | {} | {} | {} | {} |".format(row["model"], row["precision"], *sizes))
    return "\n".join(out) + "\n"


def draw(results: dict, path: Path) -> None:
    """Speed-up of a layer over the best dense one of the same precision, over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150, sharey=True)
    for ax, kind, title in zip(axes, ("forward", "step"), ("forward", "forward + backward"), strict=True):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in _measured(results, kind):
            if row["variant"] == OURS and "speedup" in row and row["density"] == 0.1:
                lines.setdefault((row["model"], row["precision"]), []).append((row["T"], row["speedup"]))
        colours = {model: f"C{n}" for n, model in enumerate(dict.fromkeys(model for model, _ in lines))}
        for (model, precision), points in sorted(lines.items()):
            style = "-" if precision == "fp8" else "--"
            points = sorted(points)
            label = f"{model}, {precision}"
            ax.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colours[model], label=label)
        ax.axhline(1, color="0.5", lw=0.8)
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        if ticks:
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in ticks])
            ax.legend(frameon=False, fontsize=7, ncols=2)
        ax.set(title=f"one layer, {title}", xlabel="tokens")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times as fast as the best dense layer")
    facts = results["runs"][-1]
    zeros = [row["zeros"] for row in results["rows"] if "zeros" in row and row["density"] == 0.1]
    about = f", {min(zeros):.0%} of the activations zero" if zeros else ""
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, medians{about}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")

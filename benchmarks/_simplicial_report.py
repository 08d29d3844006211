"""The table and the plot of benchmarks/simplicial.py, both from its rows alone."""

from pathlib import Path

HEADER = (
    f"{'section':<29}{'what':<10}{'variant':<24}{'B':>3}{'N':>7}{'H':>4}{'G':>3}{'D':>5} {'window':>9}"
    f"{'ms':>11}{'TFLOP/s':>9}"
)


def line(row: dict) -> str:
    """One row of the table."""
    if row["kind"] == "matmul":
        where = f"{'':>3}{row['N']:>7}{'':>4}{'':>3}{'':>5} {'':>9}"
    else:
        length = row["past"] if row["kind"] == "decode" else row["N"]
        window = "" if "SDPA" in row["variant"] else "{},{}".format(*row["window"])
        where = f"{row['B']:>3}{length:>7}{row['H']:>4}{row['G']:>3}{row['D']:>5} {window:>9}"
    text = f"{row['section']:<29}{row['kind']:<10}{row['variant']:<24}{where}"
    if row["status"] != "ok":
        first = row.get("error", "").splitlines()
        return f"{text}  {row['status']}{': ' + first[0][:90] if first else ''}"
    if row["kind"] == "decode":
        text += f"{row['ms'] * 1e3:>8.1f} us{row['tflops']:>9.2f}"
    else:
        text += f"{row['ms']:>11.3f}{row['tflops']:>9.1f}"
    if "time_ratio" in row:
        text += f"  {row['time_ratio']:.2f}x the time of {row['time_ratio_to']}"
    if "difference" in row:
        text += f", differs by {row['difference']:.1e}"
    return text


def draw(results: dict, path: Path) -> None:
    """Forward rates over the length, the complete step beside what else there is, and one decoded token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["status"] == "ok"]
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), dpi=150, gridspec_kw={"width_ratios": [1.5, 1.2, 1]})
    _rates(axes[0], rows)
    _steps(axes[1], rows, results["published"])
    _decoding(axes[2], rows)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    facts = results["runs"][-1]
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, medians", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def _length_axis(ax, lengths: list[int]) -> None:
    ticks = sorted(set(lengths))
    if ticks:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n) for n in ticks])


def _rates(ax, rows: list[dict]) -> None:
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        if row["section"] == "published grid" and row["kind"] == "forward":
            lines.setdefault((row["H"], *row["window"]), []).append((row["N"], row["tflops"]))
    colours = {window: f"C{n}" for n, window in enumerate(dict.fromkeys(key[1:] for key in lines))}
    heads = sorted({key[0] for key in lines})
    for (h, *window), points in sorted(lines.items()):
        style = ("-", "--", ":")[heads.index(h) % 3]
        label = f"H={h}, window {window[0]},{window[1]}"
        points.sort()
        ax.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colours[tuple(window)], label=label)
    for row in rows:
        if row["section"] == "ceiling" and row["kind"] in ("matmul", "forward"):
            ax.axhline(row["tflops"], color="0.5", lw=0.8)
            ax.annotate(
                row["variant"], (0.01, row["tflops"]), xycoords=("axes fraction", "data"), fontsize=7, va="bottom"
            )
    _length_axis(ax, [n for points in lines.values() for n, _ in points])
    if lines:
        ax.legend(frameon=False, fontsize=7, ncols=2, loc="lower right")
    ax.set_ylim(bottom=0)
    ax.set(title="forward, published grid (B=4, G=1, D=128)", xlabel="length", ylabel="TFLOP/s (4 D a visible pair)")


def _steps(ax, rows: list[dict], published: list[dict]) -> None:
    def same(row: dict) -> bool:
        return row["kind"] == "step" and row["N"] == 2048 and row["H"] == 64 and row["D"] == 128 and row["B"] == 1

    times = {}
    for row in rows:
        if same(row) and row["form"] == "trilinear" and row["G"] == 1 and row["impl"] != "eager":
            times.setdefault(row["variant"], row["ms"])
    bars = [(name, ms, "C0" if name.startswith("sidlm") else "C1") for name, ms in times.items()]
    bars += [(f"{x['short']}\n(published)", x["ms"], "0.7") for x in published if "ms" in x]
    bars.sort(key=lambda bar: bar[1])
    names, values, colours = zip(*bars, strict=True)
    ax.barh(names, values, color=colours)
    for place, value in enumerate(values):
        ax.annotate(f" {value:.1f}", (value, place), va="center", fontsize=8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.set(title="forward + backward, N=2048, H=64, (512,32)", xlabel="milliseconds")


def _decoding(ax, rows: list[dict]) -> None:
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        if row["kind"] == "decode":
            lines.setdefault((row["B"], row["H"], row["G"]), []).append((row["past"], row["ms"] * 1e3))
    for (b, h, g), points in sorted(lines.items()):
        points.sort()
        ax.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"B={b}, H={h}, G={g}")
    _length_axis(ax, [n for points in lines.values() for n, _ in points])
    if lines:
        ax.legend(frameon=False, fontsize=7)
    ax.set_ylim(bottom=0)
    ax.set(title="one decoded token, one layer", xlabel="tokens before it", ylabel="microseconds")

"""The picture of benchmarks/train_speed.py: where the time of a step goes, a bar for each row, its MFU beside it.

python benchmarks/plot_train_speed.py benchmarks/results/train_speed*.json --out docs/results/train_speed.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = {
    "FFN GEMMs": "#4477aa", "2:4": "#66ccee", "attention projections": "#bbccee", "attention": "#228833",
    "2-simplicial": "#ccbb44", "loss": "#ee6677", "optimizer and clipping": "#aa3377", "other GEMMs": "#999999",
    "other": "#dddddd",
}  # fmt: skip


def measured(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows that were measured; of a row in several files that of the last."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            if "mfu" in row:
                found[row["size"], row["row"]] = row
    return [found[key] for key in sorted(found)]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.4))
    for place, row in enumerate(reversed(rows)):
        left = 0.0
        milliseconds = 1e3 * sorted(row["step_seconds"])[len(row["step_seconds"]) // 2]
        for part, colour in PARTS.items():
            width = row["parts"].get(part, 0.0) * row["device_ms"]
            axes.barh(place, width, left=left, color=colour, label=part if place == 0 else None)
            left += width
        axes.text(max(left, milliseconds) + 10, place, f"MFU {100 * row['mfu']:.1f}%", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['size']}, {row['row']}" for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("milliseconds of one step's device time")
    axes.set_xlim(0, 1.14 * max(row["device_ms"] for row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=5, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(out, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    draw(measured(args.results), args.out)


if __name__ == "__main__":
    main()

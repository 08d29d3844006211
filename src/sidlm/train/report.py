"""report.html: one self-contained file that shows how a run went. Everything from data or model is escaped."""

from __future__ import annotations

import html
import io
import json
import statistics
from pathlib import Path
from typing import Any

from sidlm.train.folder import write_text
from sidlm.train.ledger import PHASES, Summary, summary
from sidlm.train.metrics import Record, read_json_lines

# stands for the page's text colour in drawn figures, so that they follow the light or dark page
_INK = "#010203"
_BLUE, _ORANGE = "#3b82f6", "#f59e0b"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --dim: #6b7280; --page: #fbfbfd; --card: #fff; --line: #e5e7eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --dim: #9ca3af; --page: #101319; --card: #181c24; --line: #2a303c; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 10px; } p.dim, td.dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0; }
.tile, figure, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 21px; }
.tile span { color: var(--dim); font-size: 13px; }
figure { margin: 0 0 12px; padding: 8px; } svg { width: 100%; height: auto; display: block; color: var(--ink); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: 5px 10px 5px 0;
  vertical-align: top; border-bottom: 1px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.sample { padding: 12px 16px; margin-bottom: 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.6 ui-monospace, monospace; } .sample b { color: #3b82f6; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  overflow-x: auto; }
"""


def write_report(out: Path, facts: dict[str, Any]) -> Path:
    """Write OUT/report.html and OUT/loss.png from the files of the run folder.

    facts: "peak_memory" in bytes and "tokens_per_second". Needs at least one line in metrics.jsonl.
    """
    records = read_json_lines(out / "metrics.jsonl")
    samples = read_json_lines(out / "samples.jsonl")
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    config = (out / "config.yaml").read_text(encoding="utf-8")
    command = (out / "command.txt").read_text(encoding="utf-8")
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(out.name)} - Sid</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{html.escape(out.name)}</h1>",
            f'<p class="dim">{html.escape(_subtitle(records, environment))}</p>',
            _tiles(records, facts, environment),
            "<h2>Loss</h2>",
            f"<figure>{_loss_figure(records, out / 'loss.png')}</figure>",
            _small_figures(records),
            _sparsity(records),
            _domains(records),
            _samples(samples),
            _time(summary(out)),
            "<h2>Run</h2>",
            _facts(environment),
            f"<h2>Command</h2><pre>{html.escape(command)}</pre><h2>Config</h2><pre>{html.escape(config)}</pre>",
            "</main></body></html>\n",
        ]
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def _subtitle(records: list[Record], environment: dict[str, Any]) -> str:
    last = records[-1]
    seconds = sum(r["seconds"] for r in records)
    return (
        f"{last['step']:,} steps, {last['tokens']:,} tokens, {_duration(seconds)} of training "
        f"on {environment.get('device')}, {environment.get('precision')}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tiles(records: list[Record], facts: dict[str, Any], environment: dict[str, Any]) -> str:
    losses = [r["loss"] for r in records if r["loss"] is not None]
    valid = [r["valid"]["all"] for r in records if "valid" in r]
    memory = "GPU memory" if environment["device_type"] == "cuda" else "process memory"
    tiles = [(f"{statistics.mean(losses[-10:]):.3f}" if losses else "-", "training loss, mean of the last 10 steps")]
    if valid:
        tiles.append((f"{valid[-1]['loss']:.3f}", "validation loss, nats per token"))
        tiles.append((f"{valid[-1]['bits_per_byte']:.3f}", "validation, bits per byte"))
    tiles.append((f"{facts['tokens_per_second']:,.0f}", "tokens per second"))
    tiles.append((f"{100 * statistics.median(r['mfu'] for r in records):.1f} %", "MFU, median over the steps"))
    tiles.append((f"{facts['peak_memory'] / 2**30:.2f} GiB", f"peak {memory}"))
    skipped = sum("skipped" in r for r in records)
    if skipped:
        tiles.append((str(skipped), "steps skipped: loss or gradient not finite"))
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)}</div>'


def _loss_figure(records: list[Record], png: Path) -> str:
    """Training loss, its running mean and the validation loss as SVG; also saved as a PNG."""
    figure, axes = _figure(8.4, 3.6)
    steps, losses = _series(records, "loss")
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(losses), color=_BLUE, linewidth=1.8, label="train (running mean)")
    valid = [(r["step"], r["valid"]["all"]["loss"]) for r in records if "valid" in r]
    if valid:
        axes.plot(*zip(*valid, strict=True), color=_ORANGE, marker="o", markersize=4, linewidth=1.5, label="validation")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("nats per token", color=_INK)
    axes.legend(frameon=False, labelcolor=_INK)
    figure.savefig(png, dpi=160, facecolor="white")
    return _svg(figure, "loss")


def _small_figures(records: list[Record]) -> str:
    figures = []
    for key, title in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_second", "tokens per second"),
    ):
        figure, axes = _figure(4.2, 2.3)
        axes.plot(*_series(records, key), color=_BLUE, linewidth=1.3)
        axes.set_title(title, color=_INK, fontsize=10)
        figures.append(f"<figure>{_svg(figure, key)}</figure>")
    return f'<div class="pair">{"".join(figures)}</div>'


def _sparsity(records: list[Record]) -> str:
    """Zeros and dropped activations over the run: each layer thin, their mean thick."""
    measured = [(r["step"], r["sparsity"]) for r in records if "sparsity" in r]
    if not measured:
        return ""
    figures = []
    for key, title in (("zeros", "activations that are zero, %"), ("dropped", "others dropped by 2:4 sparsity, %")):
        figure, axes = _figure(4.2, 2.3)
        found = [(step, [100 * value for value in s[key]]) for step, s in measured if None not in s[key]]
        if found:
            steps, layers = zip(*found, strict=True)
            axes.plot(steps, layers, color=_BLUE, alpha=0.25, linewidth=1)
            axes.plot(steps, [statistics.mean(values) for values in layers], color=_BLUE, linewidth=1.8)
        axes.set_title(title, color=_INK, fontsize=10)
        figures.append(f"<figure>{_svg(figure, key)}</figure>")
    return f'<h2>Sparsity of activations</h2><div class="pair">{"".join(figures)}</div>'


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(alpha=0.2)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure as inline SVG without the XML head; ids differ between figures, text stays text."""
    import matplotlib

    text = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _series(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[key]) for r in records if r[key] is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over about a twentieth of the run, of the values so far."""
    smooth, mean, weight = [], 0.0, min(0.95, 1 - 1 / max(1.0, len(values) / 20))
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**count))
    return smooth


def _domains(records: list[Record]) -> str:
    validated = [r["valid"] for r in records if "valid" in r]
    if not validated:
        return ""
    first, last = validated[0], validated[-1]
    rows = []
    for domain, numbers in last.items():
        before = f"{first[domain]['loss']:.3f}" if domain in first and len(validated) > 1 else ""
        cells = (before, f"{numbers['loss']:.3f}", f"{numbers['bits_per_byte']:.3f}", f"{numbers['tokens']:,}")
        rows.append(f"<tr><td>{html.escape(domain)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th class=n>{name}</th>" for name in ("first loss", "last loss", "bits per byte", "tokens"))
    return f"<h2>Held-out text by domain</h2><table><tr><th>domain</th>{head}</tr>{''.join(rows)}</table>"


def _samples(samples: list[Record]) -> str:
    if not samples:
        return ""
    last = max(sample["step"] for sample in samples)
    cards = [
        f"<div class=sample><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}</div>"
        for sample in samples
        if sample["step"] == last
    ]
    return f"<h2>What it writes after step {last:,}</h2>{''.join(cards)}"


def _time(spent: Summary) -> str:
    """Where the time of all starts went, and what interrupted them."""
    if not spent.elapsed:
        return ""
    rows = [
        f"<tr><td>{html.escape(PHASES.get(phase, phase))}</td><td class=n>{seconds:,.1f} s</td>"
        f"<td class=n>{100 * seconds / spent.elapsed:.1f} %</td></tr>"
        for phase, seconds in spent.seconds.items()
        if seconds
    ]
    lost = [
        f"<tr><td>{html.escape(cause)}</td><td class=n>{count}</td><td class=n>{seconds:,.1f} s</td></tr>"
        for cause, (count, seconds) in spent.causes().items()
    ]
    table = f"<table>{''.join(rows)}</table>"
    if lost:
        head = "<tr><th>interruption</th><th class=n>times</th><th class=n>lost</th></tr>"
        table += f"<table>{head}{''.join(lost)}</table>"
    return f"<h2>Effective training time: {100 * spent.effective:.1f} %</h2>{table}"


def _facts(environment: dict[str, Any]) -> str:
    rows = (
        f"<tr><td class=dim>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(_show(value))}</td></tr>"
        for name, value in environment.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _show(value: Any) -> str:
    if isinstance(value, float) or (isinstance(value, int) and value >= 10**6):
        return f"{value:.4g}"
    return "-" if value is None else str(value)

"""HTML reports: one self-contained file, figures as inline SVG. Names out of data are escaped."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.errors import SidError
from sidlm.scaling.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# stands for the page's text colour in drawn figures, so that they follow the light or dark page
INK = "#010203"
COLOURS = ("#2563eb", "#e8590c", "#0f9d58", "#9333ea", "#c2255c", "#0891b2", "#a16207", "#64748b")

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --dim: #6b7280; --page: #fbfbfd; --card: #fff; --line: #e5e7eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --dim: #9ca3af; --page: #101319; --card: #181c24; --line: #2a303c; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 8px; } .dim, caption { color: var(--dim); }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 14px; padding: 10px; }
svg { width: 100%; height: auto; display: block; color: var(--ink); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: 5px 0 5px 14px; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
"""


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A whole page of HTML parts."""
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} - Sid</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="dim">{html.escape(subtitle)}</p>'
    )
    return "\n".join([head, *parts, "</main></body></html>\n"])


def write_page(path: Path, text: str) -> None:
    """Write a report. Raises SidError naming the folder that cannot be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise SidError(f"cannot write {path}: {error.strerror}") from error


def heading(text: str, note: str = "") -> str:
    return f"<h2>{html.escape(text)}</h2>" + (paragraph(note) if note else "")


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(x))}</td>' for x in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure and its axes, drawn in the page's colours."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    found = [axes for row in figure.subplots(rows, columns, squeeze=False, **shared) for axes in row]
    for axes in found:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(which="both", colors=INK, labelsize=9)
        axes.grid(alpha=0.2)
    return figure, found


def label(axes: Any, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, color=INK, fontsize=10.5)


def plain_ticks(axis: Any) -> None:
    """Numbers such as 3.25 on a logarithmic axis, at places that suit less than a decade, too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    if high > 1e3 * low:
        subs = (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Any, **options: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=8.5, **options)


def svg(figure: Figure, name: str) -> str:
    """The figure as an HTML figure; ids differ between figures, text stays text."""
    import matplotlib

    text = io.StringIO()
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return f"<figure>{drawn[drawn.index('<svg') :].replace(INK, 'currentColor')}</figure>"


def amount(value: float | None, digits: int = 3) -> str:
    """A number in few characters: 1.2e+09 as 1.2B, None as "never"."""
    if value is None:
        return "never"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if factor <= abs(value) < 1e15:
            return f"{value / factor:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def between(low: float | None, high: float | None, digits: int = 3) -> str:
    return f"{amount(low, digits)} to {amount(high, digits)}"

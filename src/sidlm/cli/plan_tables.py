"""A plan as tables for people."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sidlm.models.flops import num_parameters
from sidlm.parallel.layout import Layout, bubble
from sidlm.parallel.plan import Plan, recomputations
from sidlm.parallel.search import WORDS, Found, neighbours, reason
from sidlm.parallel.step_time import UNMODELLED

USES = {
    "parameters": "parameters, float32, sharded",
    "gathered": "weights in the passes",
    "gradients": "gradients",
    "optimizer": "optimizer, two moments",
    "activations": "activations",
    "working": "of the block or loss at work",
    "reserved": "CUDA, NCCL, fragmentation",
}


def show(found: Found, checked: dict[str, Any], title: str) -> None:
    """Print the winner of a search and why others lost."""
    console, best = Console(), found.winner
    job, layout = best.job, best.layout
    console.print(
        f"[bold]{title}[/bold]: {num_parameters(job.config) / 1e9:.2f}B parameters, {job.batch:,} rows of "
        f"{job.seq_len:,} tokens ({job.tokens / 1e6:.1f}M) a step, {job.precision}, {layout.gpus:,} x "
        f"{best.hardware.name}\n[bold]{layout.describe()}[/bold]; {layout.micro_batches(job)} micro-batches a step",
        highlight=False,
    )
    console.print(f"sid train {' '.join(settings(layout))}", highlight=False)
    console.print(_memory(best))
    same = "the same" if checked["planned"] == checked["built"] else f"{checked['built']:,}"
    console.print(
        f"Parameters of this GPU: {checked['planned']:,} bytes planned, built on meta: {same}", highlight=False
    )
    console.print(_activations(best))
    console.print(_traffic(best))
    console.print(_time(best))
    console.print(
        f"{best.flops / 1e15:.2f} PFLOPs a GPU and step, bubble {bubble(layout, job):.1%}, [bold]step "
        f"{best.time.total:.3f} s, {job.tokens / best.time.total:,.0f} tokens/s, "
        f"{best.flops_per_second / 1e12:.0f} TFLOP/s a GPU, MFU {best.mfu:.1%}[/bold] "
        f"({best.flops_per_second * (1 + UNMODELLED) / 1e12:.0f} TFLOP/s without the calibrated {UNMODELLED:.1%})",
        highlight=False,
    )
    others = neighbours(found)
    if others:
        console.print(_others(best, others))
        console.print(f"{len(found.meshes)} meshes were searched.", highlight=False)


def show_run(whole: dict[str, Any], data: dict[str, dict[str, int]]) -> None:
    """Print what the run comes to, and what there is to read."""
    console = Console()
    console.print(
        f"the run: {whole['steps']:,} steps, {whole['tokens'] / 1e9:,.3f}B tokens, {whole['seconds'] / 86400:,.2f} "
        "days at this speed, without stops",
        highlight=False,
    )
    for source, found in data.items():
        console.print(f"data: {source}, {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB", highlight=False)


def settings(layout: Layout) -> list[str]:
    """What makes `sid train` run a layout."""
    values = {
        "parallel.dp_replicate": layout.replicas, "parallel.cp": layout.cp, "parallel.pp": layout.pp,
        "parallel.tp": layout.tp, "parallel.pipeline.virtual_stages": layout.virtual,
    }  # fmt: skip
    words = [f"--{name} {value}" for name, value in values.items() if value > 1]
    words += ["--parallel.reshard_after_forward true"] if layout.reshard else []
    return [*words, f"--train.micro_batch_size {layout.micro_batch}", f"--train.recompute {layout.recompute}"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _memory(best: Plan) -> Table:
    table = _table(f"bytes on the fullest GPU (pipeline rank {best.memory.rank})", "what", "GB")
    for name, words in USES.items():
        table.add_row(words, f"{getattr(best.memory, name) / 1e9:.2f}")
    table.add_row(f"together, of {best.hardware.memory_bytes / 1e9:.1f}", f"{best.memory.total / 1e9:.2f}")
    return table


def _activations(best: Plan) -> Table:
    """With each way of recomputation, in the same mesh."""
    table = _table(
        "with other recomputation, same mesh", "recomputed", "activations GB", "together GB", "step s", "fits"
    )
    for other in recomputations(best):
        sizes = (f"{size / 1e9:.2f}" for size in (other.memory.activations, other.memory.total))
        fits = "yes" if other.fits else "no"
        table.add_row(other.layout.recompute, *sizes, f"{other.time.total:.3f}", fits)
    return table


def _traffic(best: Plan) -> Table:
    table = _table("what this GPU receives in a step", "collective", "over", "GB", "calls")
    for found in best.traffic:
        table.add_row(found.kind, found.axis, f"{found.size / 1e9:.3f}", f"{found.calls:,}")
    return table


def _time(best: Plan) -> Table:
    table = _table("seconds of a step", "part", "s", "share")
    for name, seconds in best.time._asdict().items():
        table.add_row(WORDS[name], f"{seconds:.3f}", f"{seconds / best.time.total:.1%}")
    return table


def _others(best: Plan, others: list[Plan]) -> Table:
    table = Table(title="why not", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layout", overflow="fold", ratio=2)
    table.add_column("reason", overflow="fold", ratio=3)
    for other in others:
        table.add_row(other.layout.describe(), reason(other, best))
    return table

"""Tables of ``sid evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidlm.evaluate import DomainNLL, TaskResult
    from sidlm.evaluate.harness import HarnessResult
    from sidlm.evaluate.rewards import RewardComparison


def show_domains(result: dict[str, DomainNLL]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out text")
    table.add_column("domain", no_wrap=True)
    for title in ("documents", "tokens", "bytes", "nats/token", "bits/byte"):
        table.add_column(title, justify="right", no_wrap=True)
    for domain, part in result.items():
        table.add_row(
            domain,
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f"{part.bytes:,}",
            f"{part.nll_per_token:.4f}",
            f"{part.bits_per_byte:.4f}",
            style="bold" if domain == "all" else None,
        )
    Console().print(table)


def show_tasks(results: dict[str, TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    def share(value: float | None, ci95: float | None) -> str:
        return "" if value is None or ci95 is None else f"{100 * value:.1f} ± {100 * ci95:.1f}"

    table = Table(title="answers (NLL of the right one in nats; accuracy in % ± 95%)")
    table.add_column("task", overflow="fold")  # the file's name; the JSON has its whole path
    for title in ("questions", "NLL", "/token", "/byte", "accuracy", "per byte", "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, part in results.items():
        table.add_row(
            Path(name).name,
            f"{part.questions:,}",
            f"{part.nll:.3f}",
            f"{part.nll_per_token:.4f}",
            f"{part.nll_per_byte:.4f}",
            share(part.accuracy, part.accuracy_ci95),
            share(part.accuracy_per_byte, part.accuracy_per_byte_ci95),
            "" if part.chance is None else f"{100 * part.chance:.1f}",
        )
    Console().print(table)
    for name, part in results.items():
        if part.cut:
            print(f"{name}: {part.cut} prompts were longer than the model's context and lost their beginning")


def show_harness(results: dict[str, HarnessResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="lm-evaluation-harness (NLL of right answers in nats, shares in %, ± 95%)")
    table.add_column("task", overflow="fold")
    for title in ("N", "shots", "NLL", "/byte"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("metrics", no_wrap=True)
    for name, part in results.items():
        metrics = (
            f"{key} {m.value:.4g}" if m.ci95 is None else f"{key} {100 * m.value:.1f} ± {100 * m.ci95:.1f}"
            for key, m in part.metrics.items()
        )
        table.add_row(
            name,
            f"{part.questions:,}",
            "" if part.shots is None else str(part.shots),
            "" if part.nll is None else f"{part.nll:.2f} ± {part.nll_ci95:.2f}",
            "" if part.nll_per_byte is None else f"{part.nll_per_byte:.4f}",
            "\n".join(metrics),
        )
    Console().print(table)
    for name, part in results.items():
        if part.cut:
            print(f"{name}: {part.cut} prompts were longer than the model's context and lost their beginning")


def show_quantized(before: dict[str, DomainNLL], after: dict[str, DomainNLL]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="likelihood before and after quantisation (nats/token)")
    table.add_column("domain", no_wrap=True)
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    for domain, part in before.items():
        now = after[domain].nll_per_token
        table.add_row(domain, f"{part.nll_per_token:.5f}", f"{now:.5f}", f"{now - part.nll_per_token:+.5f}")
    Console().print(table)


def show_rewards(found: RewardComparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"rewards of answers to {found.before.prompts} prompts")
    table.add_column("")
    for title in ("mean", "std", "5%", "25%", "50%", "75%", "95%"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, part in (("before", found.before), ("quantised", found.after)):
        table.add_row(name, *(f"{value:.3f}" for value in (part.mean, part.std, *part.quantiles)))
    Console().print(table)
    print(f"Kolmogorov-Smirnov distance {found.distance:.4f}, p = {found.p_value:.3g}")

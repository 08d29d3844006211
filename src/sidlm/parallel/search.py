"""The search for the best layout of a job on a number of GPUs, and why the others lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sidlm.errors import SidError
from sidlm.parallel.config import RECOMPUTE
from sidlm.parallel.hardware import Hardware
from sidlm.parallel.layout import Job, Layout, bubble, check
from sidlm.parallel.plan import Plan, plan

MARGIN = 0.05
"""Plans whose predicted times are closer than this are equal to the model, whose own error is of that size; of them the
one with the least context, then with the least tensor and pipeline parallelism is taken."""

CP_TOKENS = 4096
"""What context parallelism leaves a rank of a row, at least. It is for long sequences: what documents of unequal length
and short chunks cost there is not in the model."""

MAX_TP = 64
MAX_TOKENS = 1 << 19
"""Of a micro-batch, on all ranks that share it: more make no product faster"""


class Found(NamedTuple):
    """What a search found."""

    winner: Plan
    fastest: Plan
    """by prediction alone; the winner is at most MARGIN slower"""
    meshes: list[Plan]
    """the best plan of every mesh: those that fit, fastest first, then those that do not, by memory"""


def search(
    job: Job, gpus: int, hardware: Hardware, fixed: Layout | None = None, *, how: str | None = None,
    cp_tokens: int = CP_TOKENS,
) -> Found:  # fmt: skip
    """The best layout of `gpus` GPUs, or of the given mesh (micro-batches and stages are still searched).

    how: which recomputation, None for any. cp_tokens: see CP_TOKENS. Where nothing fits, the winner is what needs least
    memory. Raises SidError where no mesh divides the job.
    """
    meshes = [fixed] if fixed is not None else list(_meshes(job, gpus, cp_tokens))
    best = [found for mesh in meshes if (found := _best(job, mesh, hardware, how)) is not None]
    if not best:
        if fixed is not None:
            check(fixed, job)
        raise SidError(
            f"no mesh of {gpus} GPUs divides a batch of {job.batch} rows of {job.seq_len} tokens and the model's sizes"
        )
    fitting = sorted((found for found in best if found.fits), key=lambda found: found.time.total)
    others = sorted((found for found in best if not found.fits), key=lambda found: found.memory.total)
    if not fitting:
        return Found(others[0], others[0], others)
    limit = fitting[0].time.total * (1 + MARGIN)
    winner = min((found for found in fitting if found.time.total <= limit), key=_preference)
    return Found(winner, fitting[0], fitting + others)


def _preference(found: Plan) -> tuple[float, ...]:
    layout = found.layout
    return layout.cp, layout.tp * layout.pp, found.time.total


def _meshes(job: Job, gpus: int, cp_tokens: int) -> Iterator[Layout]:
    config = job.config
    for tp in _divisors(gpus, MAX_TP):
        for cp in _divisors(gpus // tp, max(1, job.seq_len // cp_tokens)):
            for pp in _divisors(gpus // tp // cp, config.num_hidden_layers + 2):
                layout = Layout(tp=tp, cp=cp, pp=pp, dp=gpus // (tp * cp * pp))
                if _valid(job, layout):
                    yield layout


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _valid(job: Job, layout: Layout) -> bool:
    try:
        check(layout, job)
    except SidError:
        return False
    return True


def _best(job: Job, mesh: Layout, hardware: Hardware, how: str | None) -> Plan | None:
    """Of the ways to run a mesh the fastest that fits, else the one that needs least memory."""
    best: Plan | None = None
    for layout in _variants(job, mesh, how):
        found = plan(job, layout, hardware)
        if best is None or _rank(found) < _rank(best):
            best = found
    return best


def _rank(found: Plan) -> tuple[bool, float]:
    return not found.fits, found.time.total if found.fits else found.memory.total


def _variants(job: Job, mesh: Layout, how: str | None) -> Iterator[Layout]:
    rows = job.batch // (mesh.dp * mesh.replicas)
    stages = [2**n for n in range(8)] if mesh.pp > 1 else [1]
    for micro_batch in [2**n for n in range(7)]:
        for virtual in stages:
            for recompute in RECOMPUTE if how is None else (how,):
                for reshard in (False, True) if mesh.pp == 1 and mesh.shards > 1 else (False,):
                    layout = replace(
                        mesh, micro_batch=micro_batch, virtual=virtual, recompute=recompute, reshard=reshard
                    )
                    if rows % micro_batch == 0 and micro_batch * job.seq_len <= MAX_TOKENS and _valid(job, layout):
                        yield layout


def reason(other: Plan, winner: Plan) -> str:
    """Why a plan was not chosen: in numbers, against the winner."""
    if not other.fits:
        return (
            f"does not fit: {_gigabytes(other.memory.total)} of {_gigabytes(other.hardware.memory_bytes)} GB "
            + _uses(other)
        )
    slower = other.time.total / winner.time.total - 1
    if slower <= 0:
        kinds = "context" if other.layout.cp > winner.layout.cp else "tensor and pipeline"
        near = f"within the model's error of {MARGIN:.0%}"
        return f"{-slower:.1%} faster by prediction, {near}, with more {kinds} parallelism"
    parts = []
    for name, own, best in zip(other.time._fields, other.time, winner.time, strict=True):
        share = (own - best) / winner.time.total
        if name != "unmodelled" and share > 0.005:
            parts.append((share, f"{WORDS[name]} {share:+.1%}"))
    causes = ", ".join(text for _, text in sorted(parts, reverse=True)[:3])
    if other.layout.pp > 1 and bubble(other.layout, other.job) > 2 * bubble(winner.layout, winner.job):
        causes += f" (bubble {bubble(other.layout, other.job):.1%})"
    if other.layout.recompute == "blocks" and winner.layout.recompute != "blocks":
        causes = f"fits only with whole blocks recomputed; {causes}"
    if slower <= MARGIN:
        return f"{slower:.1%} slower, equal within the model's error: {causes or 'no single cause'}"
    return f"{slower:.0%} slower: {causes}"


WORDS = {
    "products": "matrix products", "attention": "attention", "memory": "elementwise functions",
    "recomputed": "recomputation", "tensor_parallel": "waiting for tensor parallelism",
    "context_parallel": "waiting for context parallelism", "bubble": "pipeline bubble",
    "weights": "exchanging weights and gradients", "optimizer": "optimizer", "unmodelled": "not modelled",
}  # fmt: skip
"""Parts of a step in words"""


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _uses(found: Plan) -> str:
    named = {name: size for name, size in found.memory._asdict().items() if name not in ("rank", "reserved")}
    largest = sorted(named.items(), key=lambda item: -item[1])[:3]
    return "(" + ", ".join(f"{name} {_gigabytes(size)}" for name, size in largest) + ")"


def neighbours(found: Found) -> list[Plan]:
    """The meshes that a reader will ask about: the fastest others, and those that differ from the winner in two sizes
    by a factor of two."""
    sizes = found.winner.layout
    near = []
    for other in found.meshes:
        changed = [
            (getattr(other.layout, name), getattr(sizes, name))
            for name in ("tp", "cp", "pp", "dp")
            if getattr(other.layout, name) != getattr(sizes, name)
        ]
        if len(changed) == 2 and all(max(pair) == 2 * min(pair) for pair in changed):
            near.append(other)
    fast = [other for other in found.meshes if other.fits and other is not found.winner][:4]
    return [*fast, *(other for other in near if other not in fast)]

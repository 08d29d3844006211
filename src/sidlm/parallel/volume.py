"""What one GPU of a planned run receives from others in a step, by kind of collective and dimension of the mesh.

A ring's bytes: an all-gather or reduce-scatter of S bytes over n processes moves S (n - 1) / n to each, an all-reduce
twice as much. The tests compare the sums with those that real plans ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sidlm.parallel.layout import EMBEDDING, HEAD, Job, Layout
from sidlm.parallel.memory import FLOAT32, itemsize, sizes, units_of_rank
from sidlm.parallel.traffic import kind_traffic


class Traffic(NamedTuple):
    """Collectives of one kind over one dimension of the mesh: of a micro-batch, or of a step where it says so."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, halo or p2p"""
    axis: str
    """tp, cp, pp, dp (and cp with it: what shares weights) or dp_replicate"""
    size: int
    """bytes that the GPU receives"""
    calls: int


def layer_exchanges(job: Job, layout: Layout, unit: str) -> tuple[list[Traffic], list[Traffic]]:
    """Of one layer and micro-batch: in (the forward, the backward pass, recomputation included)."""
    forward, backward = _tensor_parallel(job, layout)
    if layout.cp > 1:
        there, back = _context_parallel(job, layout, unit)
        backward += [back, there] if layout.recompute != "none" else [back]
        forward.append(there)
    return forward, backward


def _tensor_parallel(job: Job, layout: Layout) -> tuple[list[Traffic], list[Traffic]]:
    """Two inputs gathered and two outputs spread over the sequence, and the same of gradients."""
    if layout.tp == 1:
        return [], []
    part = layout.tokens(job) * job.config.hidden_size * itemsize(job) * (layout.tp - 1) // layout.tp
    gather, scatter = Traffic("all-gather", "tp", 2 * part, 2), Traffic("reduce-scatter", "tp", 2 * part, 2)
    # gathered inputs again; of a whole block also the sum in its middle
    again = {
        "none": [],
        "cheap": [gather],
        "blocks": [gather, Traffic("reduce-scatter", "tp", part, 1)],
    }
    return [gather, scatter], [gather, scatter, *again[layout.recompute]]


def _context_parallel(job: Job, layout: Layout, unit: str) -> tuple[Traffic, Traffic]:
    assert job.config.num_key_value_heads is not None
    found = kind_traffic(
        job.config, unit, batch=layout.micro_batch, length=job.seq_len, rank=min(1, layout.cp - 1), ranks=layout.cp,
        itemsize=itemsize(job), kv_heads=job.config.num_key_value_heads // layout.tp,
    )  # fmt: skip
    if unit == "full_attention":
        return Traffic("all-gather", "cp", found.forward, 1), Traffic("all-to-all", "cp", found.backward, 1)
    return Traffic("halo", "cp", found.forward, 1), Traffic("halo", "cp", found.backward, 1)


def end_exchanges(job: Job, layout: Layout, unit: str) -> list[Traffic]:
    """Of the embedding or the head and a micro-batch, both passes."""
    if layout.tp == 1:
        return []
    tokens = layout.tokens(job)
    part = tokens * job.config.hidden_size * itemsize(job) * (layout.tp - 1) // layout.tp
    both = [Traffic("all-gather", "tp", part, 1), Traffic("reduce-scatter", "tp", part, 1)]
    if unit == EMBEDDING:
        return both
    # of a token the largest logit, the sum of exponentials and the target's logit (parallel/loss.py)
    return [*both, Traffic("all-reduce", "tp", 2 * 3 * tokens * FLOAT32 * (layout.tp - 1) // layout.tp, 2)]


def stage_exchange(job: Job, layout: Layout) -> int:
    """Bytes of activations, or of their gradients, that go from one pipeline stage to the next in a micro-batch."""
    return layout.tokens(job) // layout.tp * job.config.hidden_size * itemsize(job)


def weight_exchanges(job: Job, layout: Layout, rank: int) -> list[Traffic]:
    """FSDP's, of one step: weights gathered in the dtype of the passes, gradients summed in float32.

    Without a pipeline every micro-batch does it anew; with one, gradients are summed over micro-batches first.
    """
    found, times = sizes(job.config, layout, rank), 1 if layout.pp > 1 else layout.micro_batches(job)
    groups = sum(len(stage) for stage in units_of_rank(job.config, layout, rank))
    exchanges = []
    if layout.shards > 1:
        share = (layout.shards - 1) * found.shard * times
        again = 2 if layout.reshard else 1
        exchanges.append(Traffic("all-gather", "dp", share * itemsize(job) * again, groups * times * again))
        exchanges.append(Traffic("reduce-scatter", "dp", share * FLOAT32, groups * times))
    if layout.replicas > 1:
        size = 2 * found.shard * FLOAT32 * (layout.replicas - 1) // layout.replicas
        exchanges.append(Traffic("all-reduce", "dp_replicate", size * times, groups * times))
    return exchanges


def step_traffic(job: Job, layout: Layout, rank: int) -> list[Traffic]:
    """All that a GPU of a pipeline rank receives in one step, one entry for each kind and dimension."""
    totals: dict[tuple[str, str], list[int]] = {}
    passes = layout.micro_batches(job)
    once = ((found, 1) for found in weight_exchanges(job, layout, rank))
    for found, times in [*_of_micro_batch(job, layout, rank, passes), *once]:
        total = totals.setdefault((found.kind, found.axis), [0, 0])
        total[0] += found.size * times
        total[1] += found.calls * times
    return [Traffic(kind, axis, *total) for (kind, axis), total in totals.items()]


def _of_micro_batch(job: Job, layout: Layout, rank: int, passes: int) -> Iterator[tuple[Traffic, int]]:
    for i, stage in enumerate(units_of_rank(job.config, layout, rank)):
        for unit in stage:
            ends = unit in (EMBEDDING, HEAD)
            found = [end_exchanges(job, layout, unit)] if ends else layer_exchanges(job, layout, unit)
            yield from ((x, passes) for exchanges in found for x in exchanges)
        number = i * layout.pp + rank
        # inputs come from the stage before, gradients from the one behind
        received = (number > 0) + (number < layout.pp * layout.virtual - 1)
        if layout.pp > 1:
            yield Traffic("p2p", "pp", received * stage_exchange(job, layout), received), passes

"""Seconds of a step of a planned run, part by part, from FLOPs, bytes and a hardware file.

Products run at the fraction of the peak that large ones reach, less what is lost where tiles do not fill the
multiprocessors; elementwise functions at the speed of the memory. Exchanges of tensor and context parallelism are
waited for; those of weights hide behind computing but for the first and the last, and slow it down (`overlap_cost`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sidlm.models.flops import visible_keys
from sidlm.ops.simplicial.flops import visible_pairs
from sidlm.parallel.hardware import Hardware
from sidlm.parallel.layout import EMBEDDING, HEAD, Job, Layout, bubble
from sidlm.parallel.memory import FLOAT32, Weight, itemsize, sizes, units_of_rank, weights
from sidlm.parallel.volume import Traffic, end_exchanges, layer_exchanges, stage_exchange, weight_exchanges

UNMODELLED = 0.0768
"""Share of the modelled step that real ones take besides: clocks, launches, slow ranks, waiting for the network.

Calibrated once, on one published number: 430 TFLOP/s of a GPU in the first row of Llama 3's table 4 (8,192 H100).
"""


class StepTime(NamedTuple):
    """Seconds of a step on the slowest pipeline rank. All but `bubble` and what follows are of its own work."""

    products: float
    """matrix products with weights"""
    attention: float
    """attention cores, ordinary and 2-simplicial"""
    memory: float
    """elementwise functions and norms"""
    recomputed: float
    """the same three again in the backward pass"""
    tensor_parallel: float
    """waiting for tensor parallelism's exchanges"""
    context_parallel: float
    bubble: float
    """waiting for other pipeline stages"""
    weights: float
    """exchanges of weights and gradients: what is waited for, and what the hidden rest slows down"""
    optimizer: float
    unmodelled: float

    @property
    def total(self) -> float:
        return sum(self)


class Work(NamedTuple):
    """Seconds of a unit and micro-batch."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    recomputed: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0

    def __add__(self, other: tuple) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def link(hardware: Hardware, layout: Layout, axis: str) -> tuple[int, int]:
    """(processes of a group, how many of them share a node)."""
    strides = {"tp": 1, "cp": layout.tp, "pp": layout.tp * layout.cp, "dp": layout.tp * layout.cp * layout.pp}
    strides["dp_replicate"] = strides["dp"] * layout.dp
    counts = {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "dp": layout.dp, "dp_replicate": layout.replicas}

    def near(name: str) -> int:
        return max(1, min(counts[name], int(hardware.gpus_per_node) // strides[name]))

    if axis == "dp":  # weights are shared over cp too
        return layout.shards, near("cp") * near("dp")
    return counts[axis], near(axis)


def exchange_seconds(hardware: Hardware, layout: Layout, found: Traffic) -> float:
    """Of an exchange: over the network each of a node's members brings in its part of what comes from other nodes."""
    count, near = link(hardware, layout, found.axis)
    inside = hardware.nvlink_bandwidth * hardware.nvlink_fraction
    if count <= near:
        return found.calls * hardware.nvlink_latency + found.size / inside
    outside = hardware.network_bandwidth * hardware.network_fraction
    from_others = found.size * (count - near) / (count - 1) / near
    if found.kind in ("halo", "p2p"):
        from_others = found.size  # from one neighbour
    return found.calls * hardware.network_latency + max(from_others / outside, found.size / inside)


def product_seconds(hardware: Hardware, tokens: int, rows: int, columns: int, fp8: bool) -> float:
    """Of the product of (tokens, columns) by (rows, columns)^T."""
    peak = hardware.fp8_flops * hardware.fp8_gemm_fraction if fp8 else hardware.bf16_flops * hardware.gemm_fraction
    tiles = math.ceil(tokens / hardware.tile_rows) * math.ceil(rows / hardware.tile_columns)
    # rounded up to tiles, and tiles to rounds of all multiprocessors; few tiles are cut along the sum, in two
    area = tiles * hardware.tile_rows * hardware.tile_columns
    rounds = math.ceil(2 * tiles / hardware.multiprocessors) / (2 * tiles / hardware.multiprocessors)
    return 2.0 * area * columns * rounds / peak


def _product(hardware: Hardware, job: Job, tokens: int, weight: Weight, layout: Layout, fp8: bool) -> float:
    """Seconds of a forward product with a two-dimensional weight, on one rank."""
    rows, columns = (size // (layout.tp if weight.split == i else 1) for i, size in enumerate(weight.shape))
    seconds = product_seconds(hardware, tokens, max(rows, 1), columns, fp8)
    # TF32 has half of the speed of bf16
    return 2 * seconds if job.precision == "fp32" else seconds


def layer_seconds(hardware: Hardware, job: Job, layout: Layout, unit: str) -> Work:
    """Of a layer, both passes and recomputation."""
    config, tokens = job.config, layout.tokens(job)
    fp8 = job.precision == "fp8"
    products = 0.0
    for weight in weights(config, unit):
        if len(weight.shape) == 1:
            continue
        in_mlp = weight.name.endswith(("gate_proj", "up_proj", "down_proj"))
        low = fp8 or (in_mlp and config.mlp_precision == "fp8")
        if len(weight.shape) == 3:  # experts, of which a token meets some
            rows = tokens * config.num_experts_per_tok
            products += _product(hardware, job, rows, Weight(weight.name, weight.shape[1:]), layout, low)
            continue
        seconds = _product(hardware, job, tokens, weight, layout, low)
        products += seconds / (hardware.sparse_ffn_speedup if in_mlp and config.mlp_sparsity else 1.0)
    forward_core, backward_core = _attention(hardware, job, layout, unit)
    memory = _elementwise(job, layout) / (hardware.memory_bandwidth * hardware.memory_fraction)
    again = {"none": 0.0, "cheap": memory, "blocks": products + forward_core + memory}[layout.recompute]
    there, back = layer_exchanges(job, layout, unit)
    waits = {"tp": 0.0, "cp": 0.0}
    for found in there + back:
        waits[found.axis] += exchange_seconds(hardware, layout, found)
    return Work(3 * products, forward_core + backward_core, 3 * memory, again, waits["tp"], waits["cp"])


def _attention(hardware: Hardware, job: Job, layout: Layout, unit: str) -> tuple[float, float]:
    """Seconds of a layer's core in the forward and in the backward pass."""
    config = job.config
    assert config.head_dim is not None and config.num_key_value_heads is not None
    w1, w2 = config.simplicial_window
    seen = {
        "full_attention": visible_keys(job.seq_len),
        "sliding_attention": visible_keys(job.seq_len, config.sliding_window),
        "simplicial_attention": visible_pairs(job.seq_len, (w1, w2)),
    }[unit]
    flops = 4.0 * config.head_dim * config.num_attention_heads / layout.tp * seen * layout.micro_batch / layout.cp
    if unit != "simplicial_attention":  # the backward pass forms the weights once more: five products for two
        return (
            flops / (hardware.bf16_flops * hardware.attention_forward),
            2.5 * flops / (hardware.bf16_flops * hardware.attention_backward),
        )
    grouped = config.num_attention_heads // config.num_key_value_heads < 64
    backward = hardware.simplicial_backward_grouped if grouped else hardware.simplicial_backward
    return flops / (hardware.bf16_flops * hardware.simplicial_forward), 3 * flops / (hardware.bf16_flops * backward)


def _elementwise(job: Job, layout: Layout) -> float:
    """Bytes that a layer's forward pass reads and writes outside of products and attention, as compiled."""
    config, tokens = job.config, layout.tokens(job)
    assert config.head_dim is not None and config.num_key_value_heads is not None
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    wide = config.intermediate_size
    if config.num_local_experts:
        wide = config.expert_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
    # two norms and two sums of the stream; rotations; gate and up in, their product out
    elements = 10 * config.hidden_size + 2 * heads * config.head_dim + (3 if config.mlp_type == "swiglu" else 2) * wide
    return tokens * elements / layout.tp * itemsize(job)


def end_seconds(hardware: Hardware, job: Job, layout: Layout, unit: str) -> Work:
    """Of the embedding or the head and its loss, both passes."""
    tokens = layout.tokens(job)
    waits = sum(exchange_seconds(hardware, layout, found) for found in end_exchanges(job, layout, unit))
    if unit == EMBEDDING:
        return Work(tensor_parallel=waits)
    matrix = next(weight for weight in weights(job.config, HEAD) if weight.name == "lm_head")
    product = _product(hardware, job, tokens, matrix, layout, fp8=False)
    logits = (
        tokens * job.config.vocab_size / layout.tp * 6 * FLOAT32
    )  # written and read by the softmax and its gradient
    return Work(
        3 * product, memory=logits / (hardware.memory_bandwidth * hardware.memory_fraction), tensor_parallel=waits
    )


def step_time(hardware: Hardware, job: Job, layout: Layout, unmodelled: float = UNMODELLED) -> StepTime:
    """Of the slowest pipeline rank."""
    assert job.config.layer_types is not None
    kinds = {EMBEDDING, HEAD, *job.config.layer_types}
    costs = {
        unit: (end_seconds if unit in (EMBEDDING, HEAD) else layer_seconds)(hardware, job, layout, unit)
        for unit in kinds
    }
    ranks = [[unit for stage in units_of_rank(job.config, layout, rank) for unit in stage] for rank in range(layout.pp)]
    work = [sum((costs[unit] for unit in units), Work()) for units in ranks]
    slowest = max(range(layout.pp), key=lambda rank: sum(work[rank]))
    passes = layout.micro_batches(job)
    own = Work(*(part * passes for part in work[slowest]))
    waiting = sum(own) * bubble(layout, job) + _fill(hardware, job, layout)
    update = 7 * FLOAT32 * sizes(job.config, layout, slowest).shard  # weight, gradient, two moments; three written
    parts = StepTime(
        *own,
        bubble=waiting,
        weights=_weights(hardware, job, layout, slowest, sum(own)),
        optimizer=update / (hardware.memory_bandwidth * hardware.memory_fraction),
        unmodelled=0.0,
    )
    return parts._replace(unmodelled=unmodelled * parts.total)


def _fill(hardware: Hardware, job: Job, layout: Layout) -> float:
    """Seconds that the first activations take to the last stage, and the last gradients back, on their way alone."""
    if layout.pp == 1:
        return 0.0
    hop = Traffic("p2p", "pp", stage_exchange(job, layout), 1)
    return 2 * (layout.pp - 1) * exchange_seconds(hardware, layout, hop)


def _weights(hardware: Hardware, job: Job, layout: Layout, rank: int, computing: float) -> float:
    """Seconds that exchanges of weights and gradients add. The first gathering and the last sum find nothing to hide
    behind: those of one of the groups that are exchanged one by one."""
    found = weight_exchanges(job, layout, rank)
    seconds = sum(exchange_seconds(hardware, layout, x) for x in found)
    stages = units_of_rank(job.config, layout, rank)
    groups = layout.virtual if layout.pp > 1 else max(1, sum(map(len, stages))) * layout.micro_batches(job)
    exposed = seconds / groups
    hidden = min(seconds - exposed, computing)
    return seconds - hidden + hardware.overlap_cost * hidden

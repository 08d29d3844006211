"""Bytes on one GPU of a planned run: weights, gradients, optimizer state, activations.

What FSDP2 and the plans of this package hold, counted from a config alone; the tests compare it with the DTensors of
real plans and with what autograd saves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sidlm.models.config import SidConfig
from sidlm.parallel.layout import EMBEDDING, HEAD, Job, Layout, stages
from sidlm.parallel.schedule import queues

FLOAT32 = 4
LOGITS_AT_ONCE = 1 << 28
"""Of `ops.linear_cross_entropy` on a GPU"""


class Weight(NamedTuple):
    """A parameter: its name within a block, shape, and which dimension tensor parallelism splits."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None

    def local(self, layout: Layout) -> int:
        """Elements on the fullest rank once tensor parallelism has split it."""
        parts = {self.split: layout.tp}
        return math.prod(-(-size // parts.get(i, 1)) for i, size in enumerate(self.shape))

    def shard(self, layout: Layout) -> int:
        """Elements on the fullest rank once FSDP has split that by its first dimension."""
        rows = -(-self.shape[0] // layout.tp) if self.split == 0 else self.shape[0]
        return self.local(layout) // rows * -(-rows // layout.shards)


def weights(config: SidConfig, unit: str) -> list[Weight]:
    """Parameters of an embedding, a head (with the final norm; its matrix even if it is the embedding), or a layer."""
    h, vocab = config.hidden_size, (config.vocab_size, config.hidden_size)
    if unit == EMBEDDING:
        return [Weight("embed_tokens", vocab, 0)]
    if unit == HEAD:
        return [Weight("norm", (h,)), Weight("lm_head", vocab, 0)]
    assert config.head_dim is not None and config.num_key_value_heads is not None
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found = [Weight("input_layernorm", (h,)), Weight("post_attention_layernorm", (h,))]
    found += [Weight("q_proj", (wide, h), 0), Weight("o_proj", (h, wide), 1)]
    simplicial = unit == "simplicial_attention"
    keys = ("k_proj", "v_proj", "k2_proj", "v2_proj") if simplicial else ("k_proj", "v_proj")
    found += [Weight(name, (narrow, h), 0) for name in keys]
    if simplicial and config.simplicial_qk_norm:
        found += [Weight(name, (config.head_dim,)) for name in ("q_norm", "k_norm", "k2_norm")]
    return found + _feed_forward_weights(config)


def _feed_forward_weights(config: SidConfig) -> list[Weight]:
    h, f = config.hidden_size, config.intermediate_size
    inward = ("gate_proj", "up_proj") if config.mlp_type == "swiglu" else ("up_proj",)
    if not config.num_local_experts:
        return [Weight("down_proj", (h, f), 1), *(Weight(name, (f, h), 0) for name in inward)]
    experts, f = config.num_local_experts, config.expert_intermediate_size
    found = [Weight("router", (experts, h)), Weight("down_proj", (experts, h, f))]
    found += [Weight(name, (experts, f, h)) for name in inward]
    if config.num_shared_experts:
        f *= config.num_shared_experts
        found += [Weight("shared.down_proj", (h, f)), *(Weight(f"shared.{name}", (f, h)) for name in inward)]
    return found


class Sizes(NamedTuple):
    """Elements of the weights of one pipeline rank: split by tensor parallelism, by FSDP too, and the largest group
    of weights that FSDP gathers at once, and the group of embedding, norm and head."""

    local: int
    shard: int
    largest_block: int
    root: int


def units_of_rank(config: SidConfig, layout: Layout, rank: int) -> tuple[tuple[str, ...], ...]:
    """What each of the stages of a pipeline rank holds."""
    return stages(config, layout.pp, layout.virtual)[rank :: layout.pp]


def sizes(config: SidConfig, layout: Layout, rank: int) -> Sizes:
    """Of a pipeline rank. Tied embeddings count once where one rank holds both."""
    units = [unit for stage in units_of_rank(config, layout, rank) for unit in stage]
    groups = {unit: weights(config, unit) for unit in set(units)}
    if config.tie_word_embeddings and EMBEDDING in groups and HEAD in groups:
        groups[HEAD] = [weight for weight in groups[HEAD] if weight.name != "lm_head"]
    local = {unit: sum(weight.local(layout) for weight in group) for unit, group in groups.items()}
    shard = {unit: sum(weight.shard(layout) for weight in group) for unit, group in groups.items()}
    return Sizes(
        sum(local[unit] for unit in units),
        sum(shard[unit] for unit in units),
        max((size for unit, size in local.items() if unit not in (EMBEDDING, HEAD)), default=0),
        sum(local.get(unit, 0) for unit in (EMBEDDING, HEAD)),
    )


def block_activations(job: Job, layout: Layout, unit: str, recompute: str) -> dict[str, int]:
    """Bytes that a layer keeps of one micro-batch for its backward pass, on one rank, by what they are.

    Those of a compiled block: autograd of single operations keeps a few elementwise results more. "cheap" keeps the
    results of matrix products and of attention, "blocks" the input alone.
    """
    config, tokens, item = job.config, layout.tokens(job), itemsize(job)
    assert config.head_dim is not None and config.num_key_value_heads is not None
    # one process computes in autocast, whose stream of activations between layers is float32
    stream = tokens // layout.tp * config.hidden_size * (FLOAT32 if layout.gpus == 1 else item)
    kept = {"input": stream}
    if recompute == "blocks":
        return kept
    whole = tokens * config.hidden_size * item
    q = tokens * config.num_attention_heads * config.head_dim // layout.tp * item
    k = tokens * config.num_key_value_heads * config.head_dim // layout.tp * item
    # others' keys are fetched again with "cheap"
    others = _positions(job, layout, unit) if recompute == "none" else 0
    keys = others * config.num_key_value_heads * config.head_dim // layout.tp * item
    pairs = 2 if unit == "simplicial_attention" else 1
    statistics = tokens * FLOAT32
    heads = tokens * config.num_attention_heads // layout.tp * FLOAT32
    kept |= {"q, k, v": q + 2 * pairs * (k + keys), "attention": q + heads, "after attention": stream}
    if unit == "simplicial_attention" and config.simplicial_qk_norm and recompute == "none":
        kept["q, k, k2 before their norms"] = q + 2 * k + heads + 2 * heads * k // q
    if recompute == "none":
        kept |= {"norms": 2 * statistics // layout.tp, "inputs of projections": 2 * whole}
    return kept | {"feed-forward": _feed_forward(job, layout, recompute)}


def _positions(job: Job, layout: Layout, unit: str) -> int:
    """Keys of other ranks that a rank keeps besides its own: those in front of its chunks, all or a halo."""
    if layout.cp == 1:
        return 0
    own = layout.tokens(job)
    config = job.config
    windows = {"sliding_attention": config.sliding_window, "simplicial_attention": max(config.simplicial_window)}
    if unit not in windows:
        # two rows of 2 cp - rank chunks each, zeros in front of the earlier one (exchange.gather_before)
        return 2 * layout.cp * own - own
    return 2 * layout.micro_batch * min(windows[unit] - 1, job.seq_len)


def _feed_forward(job: Job, layout: Layout, recompute: str) -> int:
    config, item = job.config, itemsize(job)
    kept = {"none": 1, "cheap": 0}[recompute]  # the input of the last product, which comes out of no product
    kept += 2 if config.mlp_type == "swiglu" else 1
    rows = layout.tokens(job)
    if config.num_local_experts:
        expert = config.num_experts_per_tok * (config.expert_intermediate_size * kept + 2 * config.hidden_size)
        return rows * item * (expert + config.num_shared_experts * config.expert_intermediate_size * kept)
    features = rows * config.intermediate_size // layout.tp
    if config.mlp_sparsity:  # half of the values, and two bits for each of them
        return features * item // 2 + features // 8
    return features * item * kept


def itemsize(job: Job) -> int:
    """Bytes of an activation, and of a weight in the passes."""
    return FLOAT32 if job.precision == "fp32" else 2


def loss_bytes(job: Job, layout: Layout) -> int:
    """Bytes of the head's rank while it computes the loss of a micro-batch: never logits of all tokens and the
    vocabulary, unless tokens are few."""
    config, tokens = job.config, layout.tokens(job)
    rows = -(-config.vocab_size // layout.tp)
    chunk = min(tokens, max(512, LOGITS_AT_ONCE // rows))
    logits = chunk * rows * (FLOAT32 + 2 * itemsize(job))
    hidden = 2 * tokens * config.hidden_size * itemsize(job)  # what the head reads, and its gradient
    return logits + hidden + rows * config.hidden_size * FLOAT32  # the last: the gradient of its matrix


class Memory(NamedTuple):
    """Bytes of the fullest GPU, by use."""

    parameters: int
    """this process's shards, which the optimizer sees, float32"""
    gathered: int
    """weights in the dtype of the passes"""
    gradients: int
    optimizer: int
    """two moments of AdamW, float32"""
    activations: int
    """kept for backward passes"""
    working: int
    """of the block or the loss that is being computed"""
    reserved: int
    """for CUDA, NCCL and fragmentation"""
    rank: int
    """which pipeline rank this is"""

    @property
    def total(self) -> int:
        return sum(self[:-1])


def memory(job: Job, layout: Layout, reserved: int = 0) -> Memory:
    """Of the pipeline rank that needs most."""
    return max((_memory(job, layout, rank, reserved) for rank in _fullest(layout)), key=lambda found: found.total)


def _fullest(layout: Layout) -> set[int]:
    """Ranks that may need most: activations fall from rank to rank, but the first and the last have other weights."""
    return {0, min(1, layout.pp - 1), layout.pp - 1}


def _memory(job: Job, layout: Layout, rank: int, reserved: int) -> Memory:
    found, item = sizes(job.config, layout, rank), itemsize(job)
    live, parts = activations(job, layout, rank), units_of_rank(job.config, layout, rank)
    kinds = {unit for stage in parts for unit in stage} - {EMBEDDING, HEAD}
    blocks = [sum(block_activations(job, layout, kind, "none").values()) for kind in kinds]
    # a block's activations again, or their gradients
    working = max([*blocks, loss_bytes(job, layout) if any(HEAD in stage for stage in parts) else 0])
    gathered, gradients = _weights_at_work(job, layout, found, item)
    return Memory(
        parameters=found.shard * FLOAT32,
        gathered=gathered,
        gradients=gradients,
        optimizer=2 * found.shard * FLOAT32,
        activations=live,
        working=working,
        reserved=reserved,
        rank=rank,
    )


def _weights_at_work(job: Job, layout: Layout, found: Sizes, item: int) -> tuple[int, int]:
    """Bytes of (weights in the dtype of the passes, gradients)."""
    if layout.gpus == 1:  # autocast keeps its copies until the backward pass is done
        return (0 if item == FLOAT32 else found.local * item), found.local * FLOAT32
    kept = found.local if not layout.reshard else min(found.local, found.root + 2 * found.largest_block)
    if layout.pp > 1:  # summed over micro-batches in float32 before they are spread
        return kept * item, (found.local + found.shard) * FLOAT32
    moving = max(found.largest_block, found.root) * (item + FLOAT32)  # as computed, and on its way in float32
    return kept * item, found.shard * FLOAT32 + moving


def activations(job: Job, layout: Layout, rank: int) -> int:
    """Bytes kept at the fullest moment of a step by a pipeline rank, which keeps as many passes as it may."""
    costs = [sum(kept_of(job, layout, unit) for unit in stage) for stage in units_of_rank(job.config, layout, rank)]
    live = peak = 0
    passes = layout.micro_batches(job)
    few = min(passes, 3 * layout.pp + passes % layout.pp)  # after three rounds it repeats itself
    forwards, backwards, limits = queues(layout.pp, layout.virtual, few)
    for done, (stage, _) in enumerate(forwards):
        if done >= limits[rank]:
            live -= costs[backwards[done - limits[rank]][0]]
        live += costs[stage]
        peak = max(peak, live)
    return peak


def kept_of(job: Job, layout: Layout, unit: str) -> int:
    """Bytes that an embedding, a layer or a head keeps of one micro-batch."""
    if unit == EMBEDDING:
        return layout.tokens(job) * 8  # ids
    if unit == HEAD:
        return layout.tokens(job) // layout.tp * job.config.hidden_size * itemsize(job)
    return sum(block_activations(job, layout, unit, layout.recompute).values())

"""How a planned run is spread over GPUs: sizes of the mesh, and what pipeline stages hold.

Pipelines are Llama 3's (arXiv 2407.21783, section 3.3.2, see schedule.py): 1F1B, interleaved with several `virtual`
stages of a rank. Embedding and head count as one layer each when layers are dealt out, so that the first and the last
rank have one layer fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.parallel.schedule import stage_layers


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained: a model, and batches of `batch` rows of `seq_len` tokens. precision: fp32, bf16, or fp8 (the
    matrix products of blocks)."""

    config: SidConfig
    seq_len: int
    batch: int
    precision: str = "bf16"

    @property
    def tokens(self) -> int:
        """In one optimizer step."""
        return self.batch * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh from the inside out, and what may be chosen besides."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    """dp_shard: processes that split the weights and read other rows"""
    replicas: int = 1
    """dp_replicate"""
    micro_batch: int = 1
    """rows of a pass"""
    virtual: int = 1
    """pipeline stages of a rank"""
    recompute: str = "none"
    reshard: bool = False
    """free gathered weights after the forward pass of their block, and gather them again"""

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp * self.replicas

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes by name, from the inside out; dp_replicate only where there is more than one."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}
        return sizes | ({"dp_replicate": self.replicas} if self.replicas > 1 else {})

    @property
    def shards(self) -> int:
        """Processes among which FSDP splits a weight."""
        return self.dp * self.cp

    def micro_batches(self, job: Job) -> int:
        """Passes of a rank in one step."""
        return job.batch // (self.dp * self.replicas * self.micro_batch)

    def tokens(self, job: Job) -> int:
        """Of one pass on one rank, before tensor parallelism splits them."""
        return self.micro_batch * -(-job.seq_len // self.cp)

    def describe(self) -> str:
        sizes = " ".join(f"{name.upper()} {size}" for name, size in self.mesh.items())
        how = [f"micro-batch {self.micro_batch}"]
        how += [f"{self.virtual} stages a rank"] if self.pp > 1 else []
        how += {"none": [], "cheap": ["cheap recomputation"], "blocks": ["blocks recomputed"]}[self.recompute]
        how += ["weights gathered twice"] if self.reshard else []
        return f"{sizes}, {', '.join(how)}"


def check(layout: Layout, job: Job) -> None:
    """Raise SidError, naming the numbers, for a layout that cannot be run."""
    from sidlm.parallel.tensor import check_sizes

    if layout.tp > 1:
        check_sizes(job.config, layout.tp)
    groups = layout.dp * layout.replicas
    if job.batch % groups:
        raise SidError(f"a batch of {job.batch} rows does not divide by {groups} groups that read rows (dp)")
    if (job.batch // groups) % layout.micro_batch:
        raise SidError(f"{job.batch // groups} rows of a group do not divide by micro-batches of {layout.micro_batch}")
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    if layout.tp > 1 and job.seq_len % pieces:
        raise SidError(f"{job.seq_len} tokens do not divide by {pieces} (tp {layout.tp}, cp {layout.cp})")
    layers = job.config.num_hidden_layers
    if layout.pp > 1 and layout.pp * layout.virtual > layers + 2:
        raise SidError(f"pp {layout.pp} x {layout.virtual} stages are more than {layers} layers, embedding and head")
    if layout.pp == 1 and layout.virtual > 1:
        raise SidError(f"{layout.virtual} stages a rank need pipeline parallelism, but pp is 1")


EMBEDDING, HEAD = "embedding", "head"


def stages(config: SidConfig, pp: int, virtual: int) -> tuple[tuple[str, ...], ...]:
    """What each of pp * virtual stages holds, in order: layer types, EMBEDDING and HEAD."""
    assert config.layer_types is not None
    return _stages(tuple(config.layer_types), pp * virtual)


@cache
def _stages(layer_types: tuple[str, ...], count: int) -> tuple[tuple[str, ...], ...]:
    parts = [[layer_types[i] for i in layers] for layers in stage_layers(len(layer_types), count, end_layers=1)]
    parts[0].insert(0, EMBEDDING)
    parts[-1].append(HEAD)
    return tuple(map(tuple, parts))


def bubble(layout: Layout, job: Job) -> float:
    """Share of a rank's working time that it waits for others besides: (pp - 1) / (virtual * micro-batches)."""
    return (layout.pp - 1) / (layout.virtual * layout.micro_batches(job))

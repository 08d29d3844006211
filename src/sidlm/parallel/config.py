"""How many processes split what. Imports no torch: a command's help reads it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from sidlm.errors import SidError

DIMENSIONS = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
"""Outermost first: neighbouring ranks differ in tp, whose traffic needs the fastest links (Llama 3, section 3.3.2)"""

RECOMPUTE = ("none", "cheap", "blocks")
"""What is computed again in the backward pass: nothing; what costs no matrix product; whole blocks"""

TOLD_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables from which a process knows the others"""


def launched() -> bool:
    """Whether torchrun, or what speaks its language, started this process."""
    return all(name in os.environ for name in TOLD_BY_TORCHRUN)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How the micro-batches of a step go through pipeline stages; train.micro_batch_size makes them."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """1f1b: a backward pass as soon as one can be done; gpipe: all forward passes first, holding their activations"""
    virtual_stages: int = 1
    """stages of each process, interleaved (V): smaller bubbles and more messages"""
    contiguous: int = 0
    """micro-batches in a row through one stage of a process before it turns to its next one (N); 0: parallel.pp, depth
    first; all of a step: breadth first"""
    end_layers: int = 1
    """layers that the embedding counts as, and the head, when layers are spread evenly: so many fewer on the first and
    on the last stage"""

    def __post_init__(self) -> None:
        _check_least(self, "parallel.pipeline", {"virtual_stages": 1, "contiguous": 0, "end_layers": 0})


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes split what; the product (without ep) is the number of processes.

    Raises SidError for a number that is none.
    """

    dp_replicate: int = 1
    """groups that hold the same shards of the weights and see other tokens (the outer dimension of HSDP)"""
    dp_shard: int = -1
    """processes that split the weights (FSDP) and see other tokens; -1: as many as are left"""
    pp: int = 1
    """pipeline stages, which split the layers"""
    cp: int = 1
    """context parallelism: processes that split every sequence, and the weights together with dp_shard"""
    tp: int = 1
    """tensor parallelism: processes that split every matrix, by heads, features and vocabulary"""
    ep: int = 1
    """expert parallelism: of the processes of dp_shard x cp, how many neighbours split the experts of each layer"""
    reshard_after_forward: bool = False
    """free a block's gathered weights after its forward pass and gather them again for the backward one (FSDP): less
    memory, more messages"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """with pp: how micro-batches go through the stages"""

    def __post_init__(self) -> None:
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise SidError(f"parallel.dp_shard must be at least 1, or -1 for what is left, got {self.dp_shard}")
        _check_least(self, "parallel", dict.fromkeys(("dp_replicate", "pp", "cp", "tp", "ep"), 1))

    def sizes(self, world: int) -> dict[str, int]:
        """Processes along each dimension, outermost first. Raises SidError unless they multiply to `world`."""
        sizes = {name: getattr(self, name) for name in DIMENSIONS}
        others = math.prod(size for name, size in sizes.items() if name != "dp_shard")
        if self.dp_shard == -1:
            if world % others:
                product = _product({name: size for name, size in sizes.items() if name != "dp_shard"})
                raise SidError(f"parallel: {product}, which does not divide the {world} processes")
            sizes["dp_shard"] = world // others
        elif others * self.dp_shard != world:
            raise SidError(f"parallel: {_product(sizes)}, but there are {world} processes")
        if sizes["dp_shard"] * sizes["cp"] % self.ep:
            raise SidError(
                f"parallel.ep ({self.ep}) does not divide dp_shard {sizes['dp_shard']} x cp {sizes['cp']} = "
                f"{sizes['dp_shard'] * sizes['cp']}, the processes among which experts are split"
            )
        return sizes


def _product(sizes: dict[str, int]) -> str:
    return f"{' x '.join(f'{name} {size}' for name, size in sizes.items())} = {math.prod(sizes.values())}"


def _check_least(config: object, where: str, least: dict[str, int]) -> None:
    for name, low in least.items():
        if getattr(config, name) < low:
            raise SidError(f"{where}.{name} must be at least {low}, got {getattr(config, name)}")

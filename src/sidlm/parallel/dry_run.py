"""One rank of a planned mesh on this machine: real plans over a model without memory, in torch's fake process group.

One block of each kind is enough: the others are like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.layout import EMBEDDING, HEAD, Job, Layout


@contextmanager
def fake_processes(count: int, rank: int = 0) -> Iterator[None]:
    """A process group of `count` processes, of which this one is `rank` and the others do not exist.

    Raises SidError inside of a real process group.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        raise SidError("a plan needs a process of its own: here is a process group already")
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor would take the next group's mesh for this one, also of another rank


def smallest(config: SidConfig) -> SidConfig:
    """The same model with one layer of each kind."""
    assert config.layer_types is not None
    kinds = sorted(set(config.layer_types))
    return SidConfig.from_dict(config.to_dict() | {"layer_types": kinds, "num_hidden_layers": len(kinds)})


def shard_sizes(job: Job, layout: Layout) -> dict[str, int]:
    """Elements that process 0 holds of an embedding, a head with the final norm, and a layer of each kind, from the
    DTensors of `parallelize` on a mesh of layout.gpus processes."""
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.parallel.mesh import build_mesh
    from sidlm.parallel.shard import ShardConfig, parallelize

    config = smallest(job.config)
    assert config.layer_types is not None
    # pipeline stages split no weight: those of one
    with fake_processes(layout.gpus // layout.pp):
        sizes = ParallelConfig(dp_replicate=layout.replicas, dp_shard=layout.dp, cp=layout.cp, tp=layout.tp)
        with torch.device("meta"):
            model = SidForCausalLM(config)
        parallelize(model, build_mesh(sizes, "cpu"), ShardConfig())
        found = {kind: _local(layer) for kind, layer in zip(config.layer_types, model.model.layers, strict=True)}
        found[EMBEDDING] = _local(model.model.embed_tokens)
        found[HEAD] = _local(model.model.norm) + _local(model.lm_head)
    return found


def _local(module: torch.nn.Module) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())

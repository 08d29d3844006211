"""All plans over one model: context and tensor parallelism, stages, recomputed and compiled blocks, FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sidlm.errors import SidError
from sidlm.nn.block import Block
from sidlm.parallel.config import RECOMPUTE, PipelineConfig
from sidlm.parallel.context import context_parallel
from sidlm.parallel.experts import check_experts, expert_weights, split_experts
from sidlm.parallel.mesh import expert_meshes, fsdp_mesh
from sidlm.parallel.pipeline import Pipeline
from sidlm.parallel.recompute import recompute_block
from sidlm.parallel.tensor import apply_tensor_parallel

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What `parallelize` does to a model on a mesh. Raises SidError for a value that is not known."""

    sequence_parallel: bool = True
    """with tp: split norms and the residual stream along the sequence"""
    loss_parallel: bool = True
    """with tp: compute the loss on each process's part of the vocabulary; else gather the head"""
    precision: str = "bf16"
    """of weights and activations in the forward and backward pass: fp32 or bf16. The weights that the optimizer sees
    and the sum of gradients over processes are in the dtype of the model"""
    reshard_after_forward: bool = False
    """free a block's gathered weights after its forward pass and gather them again for its backward pass. Llama 3 keeps
    them (section 3.3.2)"""
    recompute: str = "none"
    """what is computed again in the backward pass instead of kept: none, cheap (norms, elementwise functions and
    gathered inputs, no matrix product) or blocks (all but the inputs of blocks)"""
    compile: bool = False
    """compile each block"""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """with pp: how micro-batches go through the stages"""
    ep: int = 1
    """of the processes of dp_shard x cp, how many neighbours split the experts of each layer"""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SidError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.recompute not in RECOMPUTE:
            raise SidError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")


def parallelize(model: SidForCausalLM, mesh: DeviceMesh, config: ShardConfig) -> Pipeline | None:
    """Apply every plan to a built model, in place, over the mesh of `build_mesh`; names of parameters stay.

    Afterwards parameters are DTensors, and the model takes the rows that `batch_share` gives this process, the same on
    all processes of cp and tp: it cuts sequences by itself. Its loss is that of this process's tokens, and gradients
    are SUMS over the processes: divide by the labelled tokens of the whole batch (`sum_over_rows`), which is the
    argument num_items_in_batch; `sum_over_tokens` gives the loss of the batch. Make the optimizer afterwards.

    Every process must hold the same weights, or meta ones: then call ``model.to_empty(device=...)``, load a checkpoint,
    and zero the `expert_counts` of experts, which are in none.

    Returns:
        With pp above 1 what runs the model instead of calling it: `Pipeline.step`. The model then has the parameters of
        this process's stages only, under their names. Else None.

    Raises:
        SidError: sizes that do not divide by the mesh, or fewer layers than pipeline stages.
    """
    weight_dtype, tp = next(model.parameters()).dtype, mesh["tp"].size()
    if mesh["cp"].size() > 1:
        cut_sequences(model, mesh["cp"])
    if mesh["tp"].size() > 1:
        # what DTensor sums a norm of gradients over, in one message instead of one for each dimension
        mesh["dp_shard", "cp", "tp"]._flatten("shards")
        apply_tensor_parallel(
            model, mesh["tp"], sequence_parallel=config.sequence_parallel, loss_parallel=config.loss_parallel
        )
    experts = expert_meshes(mesh, config.ep) if config.ep > 1 else None
    if experts is not None:
        check_experts(model.config, config.ep)
        for layer in model.model.layers:
            split_experts(layer.get_submodule("mlp"), experts.split)
    pipeline = None
    if mesh["pp"].size() > 1:
        pipeline = Pipeline(
            model, mesh, config.pipeline,
            dtype=torch.bfloat16 if config.precision == "bf16" else weight_dtype,
            sequence_parts=tp if config.sequence_parallel else 1,
        )  # fmt: skip
    blocks = [block for block in model.model.layers if isinstance(block, Block)]
    for block in blocks:
        recompute_block(block, config.recompute, compiled=config.compile)
    roots = [model] if pipeline is None else pipeline.stages
    shard(
        blocks, roots, fsdp_mesh(mesh), None if experts is None else experts.fsdp, weight_dtype=weight_dtype,
        precision=config.precision, reshard_after_forward=config.reshard_after_forward,
    )  # fmt: skip
    if pipeline is not None and pipeline.tied is model.lm_head:  # the other name of what is split now
        model.model.embed_tokens.weight = model.lm_head.weight
    return pipeline


def cut_sequences(model: SidForCausalLM, mesh: DeviceMesh) -> None:
    """Let each call of a model with whole rows compute this process's part of them: context parallelism over mesh.

    Arguments are those of `ContextParallel.shard`, by name.
    """
    part = context_parallel(model.config, mesh)

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if args:
            raise ValueError("context parallelism takes the model's arguments by name")
        kept = {name: kwargs.pop(name) for name in ("use_cache", "return_dict") if name in kwargs}
        return (), part.shard(kwargs) | kept

    model.register_forward_pre_hook(cut, with_kwargs=True)


def shard(
    blocks: Sequence[Block], roots: Sequence[nn.Module], mesh: DeviceMesh, expert_mesh: DeviceMesh | None, *,
    weight_dtype: torch.dtype, precision: str, reshard_after_forward: bool,
) -> None:  # fmt: skip
    """FSDP2 over a 1-D mesh, HSDP over a 2-D one: each block is one group, what else is in a root another.

    roots: what is called, and holds the blocks: a model, or pipeline stages. expert_mesh: for the weights of experts
    that are split over processes already, else None; they are groups of their own then.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=weight_dtype,
        # the first cast is that of the embedding; positions and their tables must stay float32
        cast_forward_inputs=False,
    )
    for block in blocks:
        experts = set() if expert_mesh is None else {weight for _, weight in expert_weights(block.mlp)}
        settings: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": reshard_after_forward}
        fully_shard(block, mesh=mesh, ignored_params=experts, **settings)
        if experts:  # the router and shared experts are the block's
            fully_shard(block.mlp, mesh=expert_mesh, ignored_params=set(block.mlp.parameters()) - experts, **settings)
    for root in roots:
        # the head's weight is used without calling the head, so it has to be in the root's group
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                # each loss is divided by the tokens of all processes already; gloo has no reduction with a factor
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

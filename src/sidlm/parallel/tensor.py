"""Tensor parallelism: every matrix of a model split over a mesh by heads, features and vocabulary.

The plan is Megatron's (Shoeybi et al. 2019) with its sequence parallelism (Korthikanti et al. 2022): q, k, v, k2, v2,
gate and up by output features, o and down by input features, so that a layer exchanges activations twice. Between
layers the processes hold parts of the sequence. The vocabulary is split in the embedding and in the head, whose
logits are never gathered for the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from sidlm import ops
from sidlm.errors import SidError
from sidlm.nn.feed_forward import SquaredReLUFeedForward
from sidlm.parallel.loss import vocab_parallel_cross_entropy

if TYPE_CHECKING:
    from sidlm.models.config import SidConfig
    from sidlm.models.modeling import SidForCausalLM


def apply_tensor_parallel(
    model: SidForCausalLM, mesh: DeviceMesh, *, sequence_parallel: bool = True, loss_parallel: bool = True
) -> None:
    """Split a built model over a one-dimensional mesh, in place; parameters become DTensors, their names stay.

    Every process must hold the same weights (the same seed, the same checkpoint, or meta) and give the same batch.

    Args:
        sequence_parallel: whether norms and residual stream are split along the sequence, whose length must then be a
            multiple of the mesh; else every process holds them whole.
        loss_parallel: whether each process computes the loss over its part of the vocabulary; else the head is gathered
            for it.

    Raises:
        SidError: sizes that do not divide by the mesh, or experts.
    """
    check_sizes(model.config, mesh.size())
    stream = Shard(1) if sequence_parallel else Replicate()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": _Embedding(stream),
        "model.norm": _Norm(stream, Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, layer in enumerate(model.model.layers):
        plan |= {f"model.layers.{i}.{name}": style for name, style in _layer_plan(layer, stream).items()}
    # each process cuts its part out of what it holds; nothing is sent
    parallelize_module(model, mesh, plan, src_data_rank=None)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.token_loss = vocab_parallel_cross_entropy if loss_parallel else _gathered_cross_entropy
    parts = mesh.size() if sequence_parallel else 1
    model.register_forward_pre_hook(lambda _, args, kwargs: _check_call(args, kwargs, parts), with_kwargs=True)


def check_sizes(config: SidConfig, tp: int) -> None:
    """Raise SidError, naming the field and the numbers, unless a model's matrices can be split into `tp` parts."""
    if config.num_local_experts:
        raise SidError(
            f"tensor parallelism of experts is not there yet, num_local_experts is {config.num_local_experts}"
        )
    units = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8 if config.mlp_sparsity else 1}
    for name, unit in units.items():
        size = getattr(config, name)
        if size % (tp * unit):
            why = " in multiples of 8 features, which 2:4 sparsity needs" if unit > 1 else ""
            raise SidError(f"{name} ({size}) does not divide by tp ({tp}){why}")


def _layer_plan(layer: Any, stream: Placement) -> dict[str, ParallelStyle]:
    """Module name within a block -> how it is split."""
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": _Norm(stream, Replicate()),
        "post_attention_layernorm": _Norm(stream, Replicate()),
        "self_attn.o_proj": RowwiseParallel(output_layouts=stream),
    }
    for name in ("q_proj", "k_proj", "v_proj", "k2_proj", "v2_proj"):
        if hasattr(layer.self_attn, name):
            plan[f"self_attn.{name}"] = ColwiseParallel()
    for name in ("q_norm", "k_norm", "k2_norm"):
        if getattr(layer.self_attn, name, None) is not None:
            plan[f"self_attn.{name}"] = _Norm(Shard(2), None)  # (B, T, heads, head_dim)
    if isinstance(layer.mlp, SquaredReLUFeedForward) and (layer.mlp.sparsity or layer.mlp.precision):
        return plan | {"mlp": _OwnProducts(stream)}
    plan["mlp.down_proj"] = RowwiseParallel(output_layouts=stream)
    return plan | {f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj") if hasattr(layer.mlp, name)}


class _Embedding(ParallelStyle):
    """An embedding by rows of its table. The output is waited for, other than with torch's RowwiseParallel.

    A compiled block whose input is a tensor still on its way gives it no gradient (torch 2.13): the embedding would
    not learn, without a word.
    """

    def __init__(self, stream: Placement):
        super().__init__()
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", device_mesh, Shard(0))
        module.register_forward_pre_hook(lambda _, args: (_as_dtensor(args[0], device_mesh, Replicate()),))
        module.register_forward_hook(lambda _, args, out: self._sum(out))
        return module

    def _sum(self, out: Any) -> Tensor:
        return out.redistribute(placements=[self.stream]).to_local()


class _Norm(ParallelStyle):
    """A norm whose weight every process holds whole, over parts of its input; the weight's gradient is their sum.

    layout: which part of the input a process has; output: what it shall have of the output, as a DTensor, or None for
    the same part as a plain tensor. torch's SequenceParallel knows no input that is whole, and no gathered output:
    what reads a norm in a block is several projections, for which one gathering has to do.
    """

    def __init__(self, layout: Placement, output: Placement | None):
        super().__init__()
        self.layout, self.output = layout, output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", device_mesh, Replicate())
        module.register_forward_pre_hook(lambda _, args: (_as_dtensor(args[0], device_mesh, self.layout),))
        module.register_forward_hook(lambda _, args, out: self._give(out))
        return module

    def _give(self, out: Any) -> Tensor:
        return out.to_local() if self.output is None else out.redistribute(placements=[self.output])


class _OwnProducts(ParallelStyle):
    """A feed-forward layer that multiplies by its weights itself, on plain tensors: by this process's features."""

    def __init__(self, stream: Placement):
        super().__init__()
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module.get_submodule("up_proj"), "weight", device_mesh, Shard(0))
        _distribute(module.get_submodule("down_proj"), "weight", device_mesh, Shard(1))
        module.register_forward_pre_hook(lambda _, args: (self._whole(args[0], device_mesh),))
        module.register_forward_hook(lambda _, args, out: self._sum(out, device_mesh))
        return module

    def _whole(self, x: Tensor, mesh: DeviceMesh) -> Tensor:
        # a process's gradient is that of its features alone
        return _as_dtensor(x, mesh, Replicate()).to_local(grad_placements=[Partial()])

    def _sum(self, out: Any, mesh: DeviceMesh) -> Tensor:
        return _as_dtensor(out, mesh, Partial()).redistribute(placements=[self.stream]).to_local()


def _as_dtensor(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [placement], run_check=False)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by the part of it that this process holds."""
    whole = module.get_parameter(name)
    part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _gathered_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`ops.linear_cross_entropy` over the whole vocabulary, which every process computes alike."""
    assert isinstance(hidden, DTensor) and isinstance(weight, DTensor)
    whole = weight.redistribute(placements=[Replicate()]).to_local()
    out = ops.linear_cross_entropy(hidden.to_local(), whole, labels)
    assert out.ndim == 0  # the sum
    return out


def _check_call(args: tuple[Any, ...], kwargs: dict[str, Any], parts: int) -> None:
    """Raise ValueError for a forward pass of which nothing can be split."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError("a tensor-parallel model takes input_ids: its embedding is what splits the sequence")
    if ids.shape[1] % parts:
        raise ValueError(f"the sequence length ({ids.shape[1]}) does not divide by tp ({parts}): sequence parallelism")

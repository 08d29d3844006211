"""int8 and float8 inference of feed-forward layers, after Llama 3's policy (arXiv 2407.21783, section 6.2).

Only the feed-forward layers' matrix products, about half of the work, are quantised; attention, embedding and output
head are not, and the first and the last block keep theirs too. In float8 (e4m3) each row of a weight and each token's
activations have a scale of their own; the absolute maximum that an activation's scale comes from is capped at 1200, so
that one outlier does not take all precision from its token: what is above saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("int8", "float8")
ACTIVATION_CAP = 1200.0
LARGEST = 448.0
"""of e4m3"""
SMALLEST_MAXIMUM = 1e-12
"""an absolute maximum below counts as this; a token whose activations are all zero has a scale, too"""
PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize_feed_forward` did."""

    kind: str
    implementation: str
    layers: tuple[str, ...]
    """paths of the quantised linear layers below the blocks"""
    kept: tuple[int, ...]
    """blocks that were left as they are"""
    bytes_before: int
    """of the quantised layers' weights"""
    bytes_after: int


def quantize_rows(x: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """x (..., K) -> e4m3 (..., K) and scale (..., 1), float32, with x about equal to e4m3 * scale.

    The scale is the row's absolute maximum, at most ``cap``, over 448; what it does not reach becomes +-448.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(SMALLEST_MAXIMUM, cap)
    scale = largest / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class EmulatedFloat8Linear(nn.Module):
    """What a row-wise e4m3 product computes, on any device: operands rounded to float8, sums in float32.

    Sums in another order are the only difference to a GPU's. It is for judging quality: it is slower than what it
    replaces. The weights lie in memory as float8.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, cap: float | None = ACTIVATION_CAP):
        super().__init__()
        self.in_features, self.out_features, self.cap = linear.in_features, linear.out_features, cap
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.squeeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), in the dtype of x."""
        rows, scale = quantize_rows(x, self.cap)
        return (rows.float() @ self.weight.float().T * scale * self.weight_scale).to(x.dtype)


def quantize_feed_forward(
    blocks: nn.ModuleList, kind: str, *, cap: float = ACTIVATION_CAP, keep_ends: bool = True
) -> Quantized:
    """Quantise the feed-forward layers of a model's blocks in place, for inference.

    int8: torchao's weights of 8 bits with a scale for each row, products in the activations' dtype. float8: torchao's
    row-wise products on a GPU that has them (compute capability 8.9), `EmulatedFloat8Linear` elsewhere.

    Args:
        blocks: the model's blocks in order (``model.model.layers``), each with its feed-forward layer at ``mlp``.
        cap: largest absolute maximum of a token's activations in float8.
        keep_ends: whether the first and the last block stay as they are.

    Raises:
        ValueError: an unknown kind, a cap that is not positive, nothing to quantise, or a feed-forward layer that
            multiplies its weights itself (experts, 2:4 sparsity, a precision of its own); the model is unchanged then.
        ImportError: torchao is needed and not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    kept = {0, len(blocks) - 1} if keep_ends else set()
    chosen = {i: block for i, block in enumerate(blocks) if i not in kept}
    if not chosen:
        raise ValueError(f"nothing to quantise: of {len(blocks)} blocks the first and the last are kept")
    layers = {f"{i}.mlp.{name}": layer for i, block in chosen.items() for name, layer in _linears(i, block).items()}
    before = sum(layer.weight.nbytes for layer in layers.values())
    implementation, convert = _implementation(kind, cap, next(iter(layers.values())).weight)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(blocks.get_submodule(parent), name, convert(layer))
    after = sum(_nbytes(blocks.get_submodule(path)) for path in layers)
    return Quantized(
        kind=kind,
        implementation=implementation,
        layers=tuple(layers),
        kept=tuple(sorted(kept)),
        bytes_before=before,
        bytes_after=after,
    )


def _linears(index: int, block: nn.Module) -> dict[str, nn.Linear]:
    mlp: Any = block.mlp
    children = dict(mlp.named_children())
    linear = {name: child for name, child in children.items() if type(child) is nn.Linear and child.bias is None}
    own = [name for name in ("sparsity", "precision") if getattr(mlp, name, None) is not None]
    if own:
        raise ValueError(f"block {index}: its {own[0]} is {getattr(mlp, own[0])!r}, it multiplies its weights itself")
    # other children are activation functions, which hold no weights
    others = [name for name, child in children.items() if name not in linear and list(child.parameters())]
    if not linear or not set(linear) <= PROJECTIONS or others or list(mlp.parameters(recurse=False)):
        raise ValueError(
            f"block {index}: {type(mlp).__name__} is not made of linear layers {sorted(PROJECTIONS)} without bias alone"
        )
    return linear


def _implementation(kind: str, cap: float, weight: Tensor) -> tuple[str, Callable[[nn.Linear], nn.Module]]:
    """(name, what turns a linear layer into the quantised one)"""
    if kind == "float8" and not _has_float8(weight.device):
        return "emulated float8 rows", lambda layer: EmulatedFloat8Linear(layer, cap)
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    if kind == "int8":
        name, config = "torchao int8 weights", Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        name, config = (
            "torchao float8 rows",
            Float8DynamicActivationFloat8WeightConfig(
                granularity=PerRow(),
                # without the lower bound a token whose activations are all zero, as squared ReLU's may be, becomes NaN
                activation_value_lb=SMALLEST_MAXIMUM,
                activation_value_ub=cap,
                set_inductor_config=False,
            ),
        )

    def convert(layer: nn.Linear) -> nn.Module:
        # a layer alone has no path for a filter to see
        holder = nn.Sequential(layer)
        quantize_(holder, config)
        return holder[0]

    return name, convert


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _nbytes(layer: nn.Module) -> int:
    weight: Any = layer.weight
    if isinstance(layer, EmulatedFloat8Linear):
        return weight.nbytes + layer.weight_scale.nbytes
    # torchao's tensors report the bytes of what they stand for
    return sum(getattr(weight, name).nbytes for name in weight.tensor_data_names)

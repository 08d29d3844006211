"""float8 training through torchao: linear layers of inner blocks multiply in float8, the ends of the network do not.

The first and the last block, the embedding and the output head keep their precision, as in Llama 3's float8 inference
(arXiv 2407.21783, section 6.2). Weights, gradients and optimizer stay as they are: operands are cast right before a
product, scaled by their largest absolute value, of the whole tensor or of each row. FSDP gathers a weight before it is
cast; with tensor parallelism each process scales what it multiplies, its own features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sidlm.errors import SidError
from sidlm.nn.feed_forward import SquaredReLUFeedForward

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM

MULTIPLE = 16
"""what both sizes of a matrix must divide by for a float8 product"""


def convert(model: SidForCausalLM, recipe: str, device: torch.device, tp: int = 1) -> list[str]:
    """Let the inner blocks' linear layers multiply in float8, in place; the names of these layers, in their order.

    recipe: torchao's "tensorwise" or "rowwise". Names of parameters stay. Call it before blocks are compiled or
    sharded. tp: how many processes will split every matrix. On a device without float8 products torchao emulates them:
    the same numbers, slowly. Feed-forward layers with products of their own (mlp_sparsity, mlp_precision) are left to
    those.

    Raises SidError without torchao, or where nothing is left to convert.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise SidError(f"train.float8 {recipe} needs torchao ({error}): pip install 'sidlm[quantize]'") from error
    settings: Any = Float8LinearConfig.from_recipe_name(recipe)
    if not has_products(device):
        object.__setattr__(settings, "emulate", True)  # no recipe takes it as an argument
    names = convertible(model, tp)
    if not names:
        raise SidError(
            f"train.float8 {recipe}: none of the {len(model.model.layers)} blocks has a linear layer to convert: the "
            f"first and the last one are left out, and so are matrices whose sizes do not divide by {MULTIPLE * tp}"
        )
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda module, name: name in names)
    return names


def has_products(device: torch.device) -> bool:
    """Whether the device multiplies float8 matrices itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def convertible(model: SidForCausalLM, tp: int = 1) -> list[str]:
    """Names of the linear layers that `convert` takes; not of routers, whose choices are close."""
    names = []
    for i, block in list(enumerate(model.model.layers))[1:-1]:
        for name, module in block.named_modules():
            parent = block.get_submodule(name.rpartition(".")[0])
            own = isinstance(parent, SquaredReLUFeedForward) and (parent.sparsity or parent.precision)
            if not isinstance(module, nn.Linear) or own or name.endswith("router"):
                continue
            if not any(size % (MULTIPLE * tp) for size in module.weight.shape):
                names.append(f"model.layers.{i}.{name}")
    return names

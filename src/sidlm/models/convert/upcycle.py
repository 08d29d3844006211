"""A plain Llama as a Sid model: 2-simplicial layers that change nothing at first, squared-ReLU layers fitted to SwiGLU.

A 2-simplicial layer made here has the q, k, v and o of the layer it replaces, k2_proj = v2_proj = 0 and biases 1. Its
logits ``scale * sum_d q k (0 + 1)`` do not depend on the second key, so the joint softmax over pairs is the softmax
over first keys, spread evenly over the second ones, and ``sum v o (0 + 1)`` over them is attention's output: the layer
is sliding-window attention over w1 positions, whatever w2 is. So the model's logits are unchanged for documents of at
most w1 tokens, and of longer ones for the first w1; later positions no longer see what is w1 or more positions back in
these layers. The gradients of k2_proj and v2_proj are not zero, so training moves them from the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.models.convert.check import Layers
from sidlm.models.convert.source import Checkpoint, Entry, expected_tensors
from sidlm.nn.distill import FitReport, SwiGLUWeights, fit_squared_relu


class Upcycled:
    """A checkpoint whose every n-th layer, from the n-th on, is 2-simplicial with `window` (w1, w2).

    Raises SidError for layers that are not full attention, and for a model that has 2-simplicial layers already.
    """

    def __init__(self, checkpoint: Checkpoint, every: int, window: tuple[int, int]) -> None:
        self.folder: Path = checkpoint.folder
        self._checkpoint = checkpoint
        self.config = _simplicial_config(checkpoint.config, every, window)
        dtype = next(entry.dtype for entry in checkpoint.tensors.values() if entry.dtype.is_floating_point)
        self.tensors: Mapping[str, Entry] = {
            name: checkpoint.tensors.get(name, Entry(shape, dtype))
            for name, shape in expected_tensors(self.config).items()
        }

    def read(self, name: str) -> Tensor:
        if name in self._checkpoint.tensors:
            return self._checkpoint.read(name)
        return torch.zeros(self.tensors[name].shape, dtype=self.tensors[name].dtype)  # k2_proj, v2_proj


def _simplicial_config(config: SidConfig, every: int, window: tuple[int, int]) -> SidConfig:
    types = list(config.layer_types or ())
    if not 1 <= every <= len(types):
        raise SidError(f"every {every}th layer cannot be 2-simplicial in a model with {len(types)} layers")
    if "simplicial_attention" in types:
        raise SidError("the model has 2-simplicial layers already")
    for index in range(every - 1, len(types), every):
        if types[index] != "full_attention":
            raise SidError(f"layer {index} is {types[index]}, but only full_attention can become 2-simplicial")
        types[index] = "simplicial_attention"
    new = copy.deepcopy(config)
    changes: dict[str, Any] = {
        "layer_types": types, "simplicial_window": list(window), "simplicial_form": "trilinear",
        "simplicial_position": "rope", "simplicial_qk_norm": False, "simplicial_k2_bias": 1.0,
        "simplicial_v2_bias": 1.0,
    }  # fmt: skip
    for name, value in changes.items():
        setattr(new, name, value)
    try:
        new.check()
    except ValueError as error:
        raise SidError(str(error)) from error
    return new


class Distilled:
    """A checkpoint whose SwiGLU layers are squared-ReLU ones, each fitted to its outputs on text.

    One layer is fitted at a time, when it is first read: read the tensors in order. Each layer's inputs are those of
    the model as it was, so that layers do not learn to make up for each other.

    Args:
        ids: (rows, T) token ids; the last rows only measure.
        width: of the new layers; None for as many parameters as before (3/2 of the former, down to a multiple of 8).
        steps: of each fit.
        log: gets a line for each layer.

    Raises SidError for a model without dense SwiGLU layers or a width that cannot be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        *,
        width: int | None = None,
        steps: int = 500,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        former = checkpoint.config
        if former.mlp_type != "swiglu" or former.num_local_experts:
            raise SidError("only dense SwiGLU feed-forward layers can become squared-ReLU ones")
        self.folder: Path = checkpoint.folder
        self.width = width or max(8, former.intermediate_size * 3 // 2 // 8 * 8)
        if self.width % 2 or self.width > 2 * former.intermediate_size:
            raise SidError(
                f"the width of the squared-ReLU layers must be even and at most {2 * former.intermediate_size} "
                f"(twice the former), got {self.width}"
            )
        self.reports: list[FitReport] = []
        self.config = copy.deepcopy(former)
        self.config.mlp_type = "squared_relu"
        self.config.intermediate_size = self.width
        self._checkpoint, self._ids, self._steps, self._log = checkpoint, ids, steps, log
        self._layers: Layers | None = None
        self._fitted: dict[str, Tensor] = {}
        self.tensors: Mapping[str, Entry] = {
            name: Entry(shape, checkpoint.tensors[name].dtype) for name, shape in expected_tensors(self.config).items()
        }

    def read(self, name: str) -> Tensor:
        if ".mlp." not in name:
            return self._checkpoint.read(name)
        while name not in self._fitted:
            self._fit_next()
        return self._fitted[name].to(self.tensors[name].dtype)

    @torch.no_grad()
    def _fit_next(self) -> None:
        if self._layers is None:
            self._layers = Layers(self._checkpoint, self._ids)
        index = len(self.reports)
        if index == self.config.num_hidden_layers:
            raise ValueError("the layers of a distilled model are read once, in order")
        block: Any = self._layers.block(index)
        inputs: list[Tensor] = []
        block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        self._layers.hidden = self._layers.through(block, index)
        mlp = block.mlp
        former = SwiGLUWeights(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        new, report = fit_squared_relu(former, inputs[0], width=self.width, steps=self._steps)
        self.reports.append(report)
        self._log(
            f"layer {index}: squared ReLU of width {self.width}, relative error on held-out text "
            f"{report.start:.3f} at the start, {report.end:.3f} fitted"
        )
        prefix = f"model.layers.{index}.mlp."
        self._fitted = {prefix + "up_proj.weight": new.up, prefix + "down_proj.weight": new.down}

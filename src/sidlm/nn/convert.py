"""2:4 activation sparsity for the squared-ReLU feed-forward layers of a trained model, Nemotron's or Arcee's say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlm.nn.feed_forward import SquaredReLUFeedForward, plain_weight


@dataclass(frozen=True)
class LayerReport:
    """One converted layer on the given tokens."""

    path: str
    error: float
    """norm of (sparse - former) / norm of the former output"""
    zeros: float
    """share of activations that are zero"""
    dropped: float
    """share of the others that 2:4 sparsity drops"""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_squared_relu` did; the numbers are None, and ``layers`` empty, where no tokens were given."""

    converted: tuple[str, ...]
    """paths of the converted modules"""
    refused: dict[str, str]
    """path of a squared-ReLU layer that was left as it is -> why"""
    layers: tuple[LayerReport, ...] = ()
    loss_before: float | None = None
    """nats per token, of each row's tokens given those before"""
    loss_after: float | None = None
    kl_mean: float | None = None
    """KL divergence of the converted model's next-token distribution from the former one, nats, mean over positions"""
    kl_max: float | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} layers converted", *(f"{p} left: {why}" for p, why in self.refused.items())]
        for layer in self.layers:
            lines.append(
                f"{layer.path}: error {layer.error:.2e}, zeros {layer.zeros:.1%}, others dropped {layer.dropped:.2%}"
            )
        if self.loss_before is not None:
            lines.append(
                f"loss {self.loss_before:.4f} -> {self.loss_after:.4f} nats per token, "
                f"KL divergence mean {self.kl_mean:.2e}, largest {self.kl_max:.2e}"
            )
        return "\n".join(lines)


def convert_squared_relu(
    model: nn.Module, *, input_ids: Tensor | None = None, sparsity: str = "2:4", precision: str | None = None
) -> ConversionReport:
    """Make the squared-ReLU feed-forward layers of a transformers model 2:4 sparse, in place, for inference.

    A layer is one if it has ``up_proj``, ``down_proj`` and ``act_fn`` and nothing besides, and computes
    ``down_proj(relu(up_proj(x))^2)``. It keeps its path, its nn.Linear modules and so its Parameters.

    Args:
        model: any module; for the loss, one whose output has ``logits``, as transformers' models with a head.
        input_ids: (B, T) token ids to measure on, on the model's device; None to convert only.
        sparsity, precision: see `SquaredReLUFeedForward`.

    Raises:
        ValueError: no such layer, or none that can be converted (with the reasons).
    """
    found, refused = squared_relu_layers(model)
    if not found:
        reasons = "; ".join(f"{path} {why}" for path, why in refused.items())
        raise ValueError(
            f"{type(model).__name__} has no squared-ReLU feed-forward layer to convert: "
            + (reasons or "none has up_proj, down_proj and an act_fn that is relu(x)^2 (a Sid model has mlp_sparsity)")
        )
    sparse: dict[str, nn.Module] = {p: _sparse(layer, sparsity, precision) for p, layer in found.items()}
    numbers: dict[str, Any] = {} if input_ids is None else _compare(model, found, sparse, input_ids)
    _install(model, sparse)
    return ConversionReport(tuple(found), refused, **numbers)


def squared_relu_layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """(path -> layer that can be converted, path of any other squared-ReLU layer -> why not)."""
    found, refused = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        children = {name for name, _ in module.named_children()}
        if not path or children | {"act_fn"} != {"up_proj", "down_proj", "act_fn"} or list(module.parameters(False)):
            continue
        if not _is_squared_relu(getattr(module, "act_fn", None)):
            continue
        reason = _why_not(module)
        if reason is None:
            found[path] = module
        else:
            refused[path] = reason
    return found, refused


def _is_squared_relu(function: Any) -> bool:
    if not callable(function):
        return False
    x = torch.tensor([-3.0, -0.5, 0.0, 0.25, 1.0, 7.0])
    try:
        y = function(x)
    except Exception:  # whatever another kind of activation raises, it is none of this kind
        return False
    return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, x.clamp_min(0).square())


def _why_not(layer: Any) -> str | None:
    try:
        up, down = plain_weight(layer.up_proj, "up_proj"), plain_weight(layer.down_proj, "down_proj")
    except ValueError as error:
        return str(error)
    if len(up) % 8:
        return f"has {len(up)} activations, which is no multiple of 8"
    if up.is_meta or down.is_meta:
        return "has its weights on no device"
    x = torch.randn(4, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up.device, up.dtype)
    with torch.no_grad():
        mine, expected = layer(x), F.linear(F.relu(F.linear(x, up)).square(), down)
    if not torch.allclose(mine, expected, rtol=0, atol=16 * torch.finfo(up.dtype).eps * expected.abs().max().item()):
        return "computes something else than down_proj(relu(up_proj(x))^2)"
    return None


def _sparse(layer: Any, sparsity: str, precision: str | None) -> SquaredReLUFeedForward:
    with torch.device("meta"):  # its own weights are never made
        new = SquaredReLUFeedForward(
            layer.up_proj.in_features, layer.up_proj.out_features, sparsity=sparsity, precision=precision
        )
    new.up_proj, new.down_proj = layer.up_proj, layer.down_proj
    return new.train(layer.training)


def _install(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)


@torch.no_grad()
def _compare(model: nn.Module, former: dict[str, Any], sparse: dict[str, Any], input_ids: Tensor) -> dict[str, Any]:
    """The fields of a ConversionReport, one row of tokens at a time; the model is left with the former layers."""
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (batch, length >= 2), got {tuple(input_ids.shape)}")
    sums = {path: torch.zeros(5, dtype=torch.float64) for path in former}
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for row in input_ids.split(1):
            with _measuring(former, sparse, sums):
                before = _log_probabilities(model, row)
            _install(model, sparse)
            after = _log_probabilities(model, row)
            _install(model, former)
            if before is not None and after is not None:
                divergences.append((before.exp() * (before - after)).sum(-1))
                losses.append(torch.stack([_nll(p, row) for p in (before, after)], -1))
    finally:
        _install(model, former)
        model.train(was_training)
    layers = tuple(_layer_report(path, total) for path, total in sums.items())
    if not losses:
        return {"layers": layers}
    loss, kl = torch.cat(losses).mean(0).tolist(), torch.cat(divergences)
    return {
        "layers": layers, "loss_before": loss[0], "loss_after": loss[1],
        "kl_mean": kl.mean().item(), "kl_max": kl.max().item(),
    }  # fmt: skip


@contextlib.contextmanager
def _measuring(former: dict[str, Any], sparse: dict[str, Any], sums: dict[str, Tensor]) -> Iterator[None]:
    """Meanwhile each former layer's input goes through the sparse one, too, and adds to its sums."""

    def hook(path: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            new = sparse[path]
            new.measure()
            difference = new(*args).float() - out.float()
            zeros, dropped, *_ = new.statistics.nan_to_num().tolist()
            new.measure(False)
            count = args[0].numel()  # of hidden values: the same multiple of the activations' number in every row
            alive = (1 - zeros) * count
            squares = [float(difference.square().sum()), float(out.float().square().sum())]
            sums[path] += torch.tensor([*squares, alive, dropped * alive, count], dtype=torch.float64)

        return add

    handles = [layer.register_forward_hook(hook(path)) for path, layer in former.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_report(path: str, sums: Tensor) -> LayerReport:
    difference, norm, alive, dropped, count = sums.tolist()
    return LayerReport(
        path,
        error=math.sqrt(difference / norm) if norm else 0.0,
        zeros=1 - alive / count,
        dropped=dropped / alive if alive else 0.0,
    )


def _log_probabilities(model: nn.Module, row: Tensor) -> Tensor | None:
    """(T, vocabulary) of a row (1, T); None from a model without logits."""
    logits = getattr(model(input_ids=row), "logits", None)
    return None if logits is None else logits[0].float().log_softmax(-1)


def _nll(log_probabilities: Tensor, row: Tensor) -> Tensor:
    """(T - 1,)"""
    return -log_probabilities[:-1].gather(-1, row[0, 1:, None].to(log_probabilities.device)).squeeze(-1)

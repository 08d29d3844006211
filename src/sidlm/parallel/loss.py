"""Linear cross-entropy where each process holds some rows of the output head: the vocabulary is never gathered.

Of a chunk of tokens each process computes the logits of its own rows. The largest logit, the sum of exponentials and
the target's logit of a token are all that is exchanged: three numbers per token instead of V / processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sidlm.ops.loss.linear_cross_entropy import chunks, compute_dtype, high_dtype


class _SumLoss(torch.autograd.Function):
    """Sum of the negative log-likelihoods. The gradient of hidden is this process's summand, that of weight whole."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, steps: range, group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ignored, target = (labels < 0)[:, None], labels.clamp_min(0)[:, None] - first
        own = (target >= 0) & (target < len(weight))
        target = target.clamp(0, max(len(weight) - 1, 0))
        # a row of zeros adds nothing to the weight's gradient
        x, w = hidden.to(dtype).masked_fill(ignored, 0.0), weight.to(dtype)
        train_x, train_w = ctx.needs_input_grad[:2]
        high = high_dtype(dtype)
        grad_x = torch.zeros_like(x) if train_x else None
        grad_w = torch.zeros(weight.shape, dtype=high, device=weight.device) if train_w else None
        ctx.dtypes = hidden.dtype, weight.dtype
        total = torch.zeros((), dtype=high, device=x.device)
        for start in steps:
            part = slice(start, start + steps.step)
            nll, probs = _nll_and_probs(x[part] @ w.T, target[part], own[part], group, high)
            total += nll.masked_fill(ignored[part], 0.0).sum()
            if not len(w):  # more processes than rows: this one only takes part in the exchange
                continue
            grad = probs.scatter_add_(1, target[part], -own[part].to(high)).to(dtype)
            if grad_x is not None:
                torch.mm(grad, w, out=grad_x[part])
            if grad_w is not None:
                grad_w += grad.T @ x[part]
        if grad_x is not None:
            grad_x.masked_fill_(ignored, 0.0)
        ctx.grad_hidden, ctx.grad_weight = grad_x, grad_w
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        if ctx.grad_hidden is None and ctx.grad_weight is None:
            raise RuntimeError("vocab_parallel_cross_entropy: its gradients are freed after one backward pass")
        grads = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip((ctx.grad_hidden, ctx.grad_weight), ctx.dtypes, strict=True)
        ]
        ctx.grad_hidden = ctx.grad_weight = None
        return *grads, None, None, None, None, None


def _nll_and_probs(
    logits: Tensor, target: Tensor, own: Tensor, group: dist.ProcessGroup, high: torch.dtype
) -> tuple[Tensor, Tensor]:
    """NLL (n, 1) over the rows of all processes, and the probabilities (n, rows) of the own rows of logits (n, rows).

    target (n, 1): row of the token to predict, which counts where own (n, 1).
    """
    logits = logits.to(high)
    peak = logits.amax(dim=1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), -torch.inf)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    gap = (peak - logits.gather(1, target)).masked_fill(~own, 0.0) if logits.shape[1] else torch.zeros_like(peak)
    weights = logits.sub_(peak).exp_()
    sums = torch.cat((weights.sum(dim=1, keepdim=True), gap), dim=1)
    dist.all_reduce(sums, group=group)
    normaliser, gap = sums[:, :1], sums[:, 1:]
    return gap + normaliser.log(), weights.div_(normaliser)


def vocab_parallel_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """The sum that `ops.linear_cross_entropy` gives, () in float32 (float64 for float64), the same on every process.

    Args:
        hidden: (N, d), a DTensor that every process holds whole; its gradient is the sum over the processes.
        weight: (V, d), a DTensor split by rows over the same one-dimensional mesh; V need not divide by its size.
        labels: (N,) ids in [0, V), the same on every process, negative to ignore a token.
        chunk: tokens whose logits are held at once; None picks by device and rows.

    Raises:
        ValueError: another layout than these, or shapes that disagree.
    """
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        raise ValueError(f"weight must be a DTensor split by rows over one dimension of a mesh, got {_layout(weight)}")
    if not isinstance(hidden, DTensor) or hidden.placements != (Replicate(),):
        raise ValueError(f"hidden must be a DTensor that every process holds whole, got {_layout(hidden)}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = tuple(hidden.shape), tuple(weight.shape), tuple(labels.shape)
        raise ValueError("hidden {}, weight {} and labels {} must be (N, d), (V, d) and (N,)".format(*shapes))
    first, part, dtype, steps = _parts(hidden, weight, chunk)
    local = hidden.to_local(grad_placements=[Partial()]), part
    with torch.autocast(hidden.device.type, enabled=False):
        return _SumLoss.apply(*local, labels, first, steps, weight.device_mesh.get_group(), dtype)


@torch.no_grad()
def vocab_parallel_nll(hidden: Tensor, weight: Any, labels: Tensor) -> Tensor:
    """Each token's loss (N,), the same on every process and without gradient.

    hidden: (N, d), the same on every process; weight and labels as of `vocab_parallel_cross_entropy`, no label ignored.
    """
    first, local, dtype, steps = _parts(hidden, weight)
    found, group = hidden.new_empty(len(hidden), dtype=high_dtype(dtype)), weight.device_mesh.get_group()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in steps:
            part = slice(start, start + steps.step)
            target = labels[part, None] - first
            own = (target >= 0) & (target < len(local))
            logits = hidden[part].to(dtype) @ local.to(dtype).T
            target = target.clamp(0, max(len(local) - 1, 0))
            found[part] = _nll_and_probs(logits, target, own, group, high_dtype(dtype))[0][:, 0]
    return found


@torch.no_grad()
def vocab_parallel_choice(hidden: Tensor, weight: Any, labels: Tensor, noise: Tensor | None = None) -> Tensor:
    """The token of the largest logit (N,) int64, the first of equal ones, the same on every process.

    noise: (R, V), of which row `label` is added to the logits; else labels are not looked at.
    """
    first, local, dtype, steps = _parts(hidden, weight)
    found, group = hidden.new_empty(len(hidden), dtype=torch.int64), weight.device_mesh.get_group()
    with torch.autocast(hidden.device.type, enabled=False):
        for start in steps:
            part = slice(start, start + steps.step)
            logits = hidden[part].to(dtype) @ local.to(dtype).T
            if noise is not None:
                logits = logits + noise[:, first : first + len(local)].to(logits.device)[labels[part]]
            if not len(local):  # more processes than rows
                logits = logits.new_full((len(logits), 1), -torch.inf)
            own = logits.amax(dim=1)
            where = logits.argmax(dim=1)  # unlike max it gives the first of equal ones
            peak = own.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            where = torch.where(own == peak, where + first, len(weight))
            dist.all_reduce(where, dist.ReduceOp.MIN, group)
            found[part] = where
    return found


def _parts(hidden: Tensor, weight: DTensor, chunk: int | None = None) -> tuple[int, Tensor, torch.dtype, range]:
    """Row of the head at which this process's part begins, that part, the dtype of products, and chunks of tokens."""
    mesh = weight.device_mesh
    _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    # every process cuts the tokens alike, whatever number of rows it holds
    steps = chunks(len(hidden), -(-len(weight) // mesh.size()), chunk, hidden.device)
    return first, weight.to_local(), compute_dtype(hidden), steps


def _layout(x: Tensor) -> str:
    return f"placements {x.placements}" if isinstance(x, DTensor) else f"a {type(x).__name__}"

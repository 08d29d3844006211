"""Output projection and cross-entropy in one: the logits of all tokens are never held at once.

The gradients of a chunk are formed while its logits are at hand (Liger kernel, Hsu et al. 2024), so training costs
three matrix products per chunk, as the unfused loss does, and the memory of one chunk.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits held at once: what a CPU's cache takes gladly, and what fills a GPU."""


def chunks(tokens: int, vocab: int, chunk: int | None, device: torch.device) -> range:
    # fewer rows than this, and the products wait for the weight matrix instead of computing
    size = chunk or max(512, CHUNK_ELEMENTS.get(device.type, 1 << 26) // vocab)
    if chunk is None and tokens:  # of one size: what is compiled for it is compiled once
        size = -(-tokens // -(-tokens // size))
    return range(0, tokens, size)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def high_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nll_and_probs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """NLL (n, 1) of target (n, 1), and the probabilities (n, V), written over the logits if the dtype is theirs."""
    high = high_dtype(logits.dtype)
    peak, where = logits.max(dim=1, keepdim=True)
    gap = peak.to(high) - logits.gather(1, target).to(high)
    probs = torch.softmax(logits, dim=1, dtype=high, out=logits if logits.dtype == high else None)
    # log-sum-exp is told by the largest probability, at least 1/V; the target's own may have underflowed
    return gap - probs.gather(1, where).log(), probs


def _nll_and_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """NLL (n, 1) of target (n, 1), and its gradient (n, V) in the logits' dtype."""
    nll, probs = _nll_and_probs(logits, target)
    return nll, probs.scatter_add_(1, target, probs.new_full((), -1.0).expand_as(nll)).to(logits.dtype)


def _fused_nll_and_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same, in a form of which a compiler makes one kernel that reads logits twice and writes the gradient."""
    log_probs = torch.log_softmax(logits, dim=1, dtype=high_dtype(logits.dtype))
    hit = torch.arange(logits.shape[1], device=logits.device) == target
    return -log_probs.gather(1, target), (log_probs.exp() - hit.to(log_probs.dtype)).to(logits.dtype)


@functools.cache
def _gradient_on(device_type: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How a device gets the gradient: on CUDA the softmax would else cross the memory five times."""
    return torch.compile(_fused_nll_and_gradient, dynamic=False) if device_type == "cuda" else _nll_and_gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, summed in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":  # the product never exists in the lower precision
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _SumLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, dtype: torch.dtype) -> Tensor:
        ignored, target = (labels < 0)[:, None], labels.clamp_min(0)[:, None]
        # a row of zeros adds nothing to the weight's gradient
        x, w = hidden.to(dtype).masked_fill(ignored, 0.0), weight.to(dtype)
        train_x, train_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if train_x else None
        high = high_dtype(dtype)
        grad_w = torch.zeros(weight.shape, dtype=high, device=weight.device) if train_w else None
        ctx.dtypes = hidden.dtype, weight.dtype
        total = torch.zeros((), dtype=high, device=x.device)
        steps, gradient = chunks(len(x), len(w), chunk, x.device), _gradient_on(x.device.type)
        logits = x.new_empty(min(steps.step, len(x)), len(w))
        for start in steps:
            part = slice(start, start + steps.step)
            nll, grad = gradient(torch.mm(x[part], w.T, out=logits[: len(x[part])]), target[part])
            total += nll.masked_fill(ignored[part], 0.0).sum()
            if grad_x is not None:
                torch.mm(grad, w, out=grad_x[part])
            if grad_w is not None:
                _add_product(grad_w, grad.T, x[part])
        if grad_x is not None:
            grad_x.masked_fill_(ignored, 0.0)
        ctx.grad_hidden, ctx.grad_weight = grad_x, grad_w
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        if ctx.grad_hidden is None and ctx.grad_weight is None:
            raise RuntimeError("linear_cross_entropy: its gradients are freed after one backward pass")
        grads = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip((ctx.grad_hidden, ctx.grad_weight), ctx.dtypes, strict=True)
        ]
        ctx.grad_hidden = ctx.grad_weight = None
        return *grads, None, None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    *,
    reduction: str = "sum",
    chunk: int | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "n"]:
    """Negative log-likelihood (nats) of ``labels`` under ``softmax(hidden @ weight.T)``.

    Args:
        hidden: (N, d). weight: (V, d). labels: (N,) ids in [0, V), or -100 (any negative) to ignore a token.
        reduction: "sum", a differentiable float32 scalar (float64 for float64), or "none", (N,) without gradient and
            zero where ignored.
        chunk: tokens whose logits are held at once; None picks by device and V. Under autocast the products run in
            its dtype; the softmax is float32 always.

    Raises:
        ValueError: shapes that disagree, or an unknown reduction.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = tuple(hidden.shape), tuple(weight.shape), tuple(labels.shape)
        raise ValueError("hidden {}, weight {} and labels {} must be (N, d), (V, d) and (N,)".format(*shapes))
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if reduction == "sum":
            return _SumLoss.apply(hidden, weight, labels, chunk, dtype)
        if reduction != "none":
            raise ValueError(f'reduction is {reduction!r}, but must be "sum" or "none"')
        with torch.no_grad():
            steps = chunks(len(hidden), len(weight), chunk, hidden.device)
            w, out = weight.to(dtype), []
            for start in steps:
                part = slice(start, start + steps.step)
                nll, _ = _nll_and_probs(hidden[part].to(dtype) @ w.T, labels[part].clamp_min(0)[:, None])
                out.append(nll[:, 0].masked_fill(labels[part] < 0, 0.0))
            return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.float32)

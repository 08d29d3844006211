"""bfloat16 inputs with the products of float16: eight times finer virtual queries and weights, at the same speed.

The kernels round u = q o k2 (k2 x q), dO o v2 and the weights to the inputs' dtype: in bfloat16, to eight bits. What is
a bfloat16 is exact in float16 once a power of two has brought it into range. So the tensors are scaled, and the kernels
run in float16. The powers cancel: those of q, k and k2 in the logits, the others in what comes out, in bfloat16.

A product is at most 2^15 wherever the kernels round one: with D = 256, |u| < 2^(E / 2 + 2) for logits that are sums of
D terms below 2^(E + 3), |dO o v2| < 2^-3, |dP| < 2^6, P < 2^8. Values more than 2^24 times smaller than the largest of
their tensor become zero. A tensor that holds infinity or NaN is left at its scale: what it does not touch stays right.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LIFT = 8  # powers of two by which a backward pass raises the weights: those of 2^18 pairs stay normal numbers


def _exponent(x: Tensor) -> Tensor:
    """e with 2^e <= largest magnitude < 2^(e + 1), a scalar in float32 on x's device; 0 if there is none."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = x.aminmax()  # one pass, and no copy of the magnitudes
    top = torch.maximum(-low, high).float()
    e = torch.frexp(top).exponent.float() - 1
    return torch.where(top.isfinite() & (top > 0), e, 0.0).clamp(-40, 40)


def _power(by: Tensor) -> Tensor:
    """2^by, float32, exactly."""
    return (by.int().clamp(-126, 127) + 127 << 23).view(torch.float32)


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    """x * 2^by in float16, in one pass."""
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    return torch.mul(x, _power(by).to(x.dtype), out=out)


def _inputs(q, k, v, k2, v2, k2_bias, v2_bias) -> tuple[list[Tensor], list[Tensor]]:
    """The five tensors in float16, biases added, and the powers of two by which each was multiplied."""
    k2 = k2.float() + k2_bias if k2_bias else k2
    v2 = v2.float() + v2_bias if v2_bias else v2
    of_q, of_k, of_k2 = (_exponent(x) for x in (q, k, k2))
    half = ((of_q + of_k + of_k2) / 2).floor()  # as large as k: neither it nor u may overflow
    powers = [-of_q, of_q + of_k2 - half, -_exponent(v), half - of_k2, -_exponent(v2)]
    return [_scaled(x, by) for x, by in zip((q, k, v, k2, v2), powers, strict=True)], powers


def forward(
    run: Callable, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `run`, an implementation's forward, gives for bfloat16 inputs, with float16 inside."""
    xs, (_q, _k, of_v, _k2, of_v2) = _inputs(q, k, v, k2, v2, k2_bias, v2_bias)
    out, lse = run(*xs, w1, w2, form, scale, 0.0, 0.0, doc_ids, dtype=q.dtype)
    return out.mul_(_power(-of_v - of_v2).to(out.dtype)), lse


def backward(
    run: Callable, by_lse: bool, grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor,
    v2: Tensor, out: Tensor, lse: Tensor, w1: int, w2: int, form: str, scale: float, k2_bias: float, v2_bias: float,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `run`, an implementation's backward, gives for bfloat16 inputs, with float16 inside.

    by_lse: whether its weights are exp(logit - LSE), which a smaller LSE raises, or a softmax taken again.
    """
    xs, powers = _inputs(q, k, v, k2, v2, k2_bias, v2_bias)
    of_v, of_v2, of_out = powers[2], powers[4], -_exponent(grad_out) - 5
    loss = of_v + of_v2 + of_out
    lift = LIFT if by_lse else 0
    grads = run(
        _scaled(grad_out, of_out), grad_lse * _power(loss), *xs, _scaled(out, of_v + of_v2),
        lse - lift * math.log(2), w1, w2, form, scale, 0.0, 0.0, doc_ids, dtype=q.dtype,
    )  # fmt: skip
    # what came out is the gradient of 2^(loss + lift) times the loss by 2^by times the tensor
    scaled = (grad.mul_(_power(by - loss - lift).to(grad.dtype)) for grad, by in zip(grads, powers, strict=True))
    dq, dk, dv, dk2, dv2 = scaled
    return dq, dk, dv, dk2, dv2

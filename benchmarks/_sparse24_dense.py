"""The dense feed-forward layers that benchmarks/sparse24.py compares with, over `torch.mm` and `torch._scaled_mm`.

Everything between two products is one pass (_sparse24_dense_kernels.py). In fp8 with a scale for each tensor the scales
are known before, as with delayed scaling, so no pass looks for a maximum: what dense fp8 training can be at its best.
Or they are sought, as the other layers do, but for those of what lies between the products.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Layer(NamedTuple):
    """Operands of one layer in bf16: x (T, d), grad of the result, w_in (F, d), or (2 F', d) of SwiGLU, and w_down."""

    x: Tensor
    grad: Tensor
    w_in: Tensor
    w_down: Tensor
    kind: str = "relu2"

    @property
    def flops(self) -> int:
        """Of the forward pass; with the backward pass it is three times as many."""
        return 2 * len(self.x) * (self.w_in.numel() + self.w_down.numel())


Results = tuple[Tensor, ...]
"""The result; for a step also the gradients of x, w_in and w_down."""


def bf16(layer: Layer, step: bool) -> Results:
    from _sparse24_dense_kernels import pointwise, pointwise_backward

    x, grad, w_in, w_down, kind = layer
    y = x @ w_in.T
    h, _ = pointwise(y, kind, x.dtype)
    out = h @ w_down.T
    if not step:
        return (out,)
    _, dy, _ = pointwise_backward(y, grad @ w_down, kind, x.dtype, turned=False)
    return out, dy @ w_in, dy.T @ x, grad.T @ h


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, fast: bool = True) -> Tensor:
    return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def tensorwise(layer: Layer, sought: bool = False) -> Callable[[bool], Results]:
    """In e4m3 with scales that are known before: the function of `step`.

    sought: those of x, grad and the weights are looked for in each call, by a pass over each; they come out the same.
    """
    from _sparse24_dense_kernels import pointwise, pointwise_backward, scale_of

    x, grad, w_in, w_down, kind = layer
    y = x @ w_in.T
    h, _ = pointwise(y, kind, x.dtype)
    _, dy, _ = pointwise_backward(y, grad @ w_down, kind, x.dtype, turned=False)
    tops = torch.stack([t.abs().amax().float() for t in (x, grad, w_in, w_down, h, dy)])
    # powers of two, as in the layers they are compared with
    scales = torch.exp2(torch.ceil(torch.log2(tops / 448)))
    sx, sg, si, sd, sh, sy = (s.clone() for s in scales)  # each in memory of its own: cuBLASLt wants them aligned
    fx, fg, fi, fd, fh, fy = scales.tolist()
    del y, h, dy

    def run(step: bool) -> Results:
        of_x, of_in, of_down = (scale_of(t) for t in (x, w_in, w_down)) if sought else (sx, si, sd)
        x8, x8t = pointwise(x, "copy", FP8, fx, turned=step)
        i8, i8t = pointwise(w_in, "copy", FP8, fi, turned=step)
        d8, d8t = pointwise(w_down, "copy", FP8, fd, turned=step)
        y = _multiply(x8, of_x, i8, of_in)
        h8, _ = pointwise(y, kind, FP8, fh)
        out = _multiply(h8, sh, d8, of_down)
        if not step:
            return (out,)
        of_g = scale_of(grad) if sought else sg
        g8, g8t = pointwise(grad, "copy", FP8, fg, turned=True)
        h8t, dy8, dy8t = pointwise_backward(y, _multiply(g8, of_g, d8t, of_down), kind, FP8, fh, fy, turned=True)
        return out, _multiply(dy8, sy, i8t, of_in), _multiply(dy8t, sy, x8t, of_x), _multiply(g8t, of_g, h8t, sh)

    return run


def rowwise(layer: Layer, step: bool, fast: bool = False) -> Results:
    """In e4m3 with a scale for each row along the axis that is summed over, powers of two.

    relu^2, its derivative and their quantisation are one pass each. Operands of the weights' gradients are transposed
    from their e4m3 form, each in one pass after one that finds the largest of each feature: a power of two as a scale
    for another rounds nothing again. So 3 bytes an element go between the products forward, 10 backward.
    """
    from _sparse24_dense_kernels import largest_of_columns, relu2_backward_rows, relu2_rows, turn_rows

    from sidlm.ops.sparse24.triton_quantize import quantize_rows

    def multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return _multiply(a[0], a[1][:, None], b[0], b[1][None], fast)

    def turned(a: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return turn_rows(a, scale, largest_of_columns(a, scale))

    x, w_in, w_down = (quantize_rows(t) for t in (layer.x, layer.w_in, layer.w_down))
    h = relu2_rows(multiply(x, w_in))
    out = multiply(h, w_down)
    if not step:
        return (out,)
    dy = relu2_backward_rows(multiply(quantize_rows(layer.grad), turned(layer.w_down)), *h)
    dx = multiply(dy, turned(layer.w_in))
    return out, dx, multiply(turned(*dy), turned(layer.x)), multiply(turned(layer.grad), turned(*h))

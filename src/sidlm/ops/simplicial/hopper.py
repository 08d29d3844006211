"""2-simplicial attention on Hopper: kernels for it where they can run, the portable ones for the rest.

They take head dimensions 64 and 128 and a shorter window of at most 64, both forms. Those of hopper_wide.py, in CUDA
C++, take what goes over virtual queries in groups of 16, 32, ... heads; the others are written in Gluon. The backward
pass of groups of fewer heads is that of hopper_narrow*.py, where the shorter window is at most 32.
"""

import torch
from torch import Tensor

from sidlm.ops.simplicial import (
    hopper_backward_keys,
    hopper_backward_queries,
    hopper_forward,
    hopper_narrow,
    hopper_narrow_keys,
    hopper_narrow_queries,
    hopper_tiles,
    hopper_wide,
    portable,
    prepare,
)
from sidlm.ops.simplicial.triton_backward_keys import difference


def takes(p: prepare.Problem, scale: float, doc_ids: Tensor | None) -> bool:
    """Whether the kernels for Hopper can run this problem.

    A tile of rows that spans queries may span documents, and would multiply the NaN of one by the zeros of another.
    """
    if p.q.shape[-1] not in (64, 128) or p.w2 > 64 or scale <= 0 or p.wide or p.q.numel() == 0:
        return False
    return doc_ids is None or p.shape[5] % hopper_tiles.pairs_of_tile(p.w2) == 0


def _problem(*args) -> prepare.Problem:
    """The bias of the determinant's virtual queries is written out: it would reach the zeros of the permuted copies."""
    p = prepare.problem(*args)
    return p._replace(k2=p.k2 + p.k2_bias, k2_bias=0.0) if p.determinant and p.k2_bias else p


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) in dtype (q's), contiguous, and natural-log LSE (B, T, H), float32."""
    p = _problem(q, k, v, k2, v2, w1, w2, form, k2_bias, v2_bias)
    if not takes(p, scale, doc_ids):
        return portable.forward(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, dtype)
    run = hopper_wide.forward if hopper_wide.takes(p) else hopper_forward.launch
    return run(p, scale, prepare.reach(doc_ids, q.shape[1]), dtype)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, out: Tensor,
    lse: Tensor, w1: int, w2: int, form: str, scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k2, v2, each contiguous in its input's shape, in dtype (the inputs').

    The same bits every time.
    """
    p = _problem(q, k, v, k2, v2, w1, w2, form, k2_bias, v2_bias)
    if not takes(p, scale, doc_ids):
        settings = (w1, w2, form, scale, k2_bias, v2_bias, doc_ids, dtype)
        return portable.backward(grad_out, grad_lse, q, k, v, k2, v2, out, lse, *settings)
    grad_out, grad_lse, out, lse = (x.contiguous() for x in (grad_out, grad_lse, out, lse))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    portable.plan_delta(grad_out, grad_lse, out, delta).run()
    reach = prepare.reach(doc_ids, q.shape[1])
    if hopper_narrow.takes(p):
        dq, dk2, dv2 = hopper_narrow_queries.launch(p, scale, grad_out, lse, delta, reach, dtype)
        dk, dv = hopper_narrow_keys.launch(p, scale, grad_out, lse, delta, reach)
        return _in_order(p, dq, [dk, dv, dk2, dv2], dtype)
    if hopper_wide.takes(p) and not p.determinant:
        dq = hopper_wide.backward(p, scale, grad_out, lse, delta, reach, dtype)
    else:
        dq = hopper_backward_queries.launch(p, scale, grad_out, lse, delta, reach, dtype)
        dq = difference(p, list(dq)).to(dtype or q.dtype) if p.determinant else dq[0]
    last = None
    if doc_ids is not None:
        first, last = (x[:, -p.k2.shape[1] :] for x in prepare.extents(doc_ids, q.shape[1]))
        last = torch.stack((last, first))
    grads = hopper_backward_keys.launch(p, scale, grad_out, lse, delta, last)
    return _in_order(p, dq, grads, dtype)


def _in_order(
    p: prepare.Problem, dq: Tensor, grads: list[Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as the inputs came; grads: of the first axis' keys and values, then of the second's."""
    dk, dv, dk2, dv2 = (x.to(dtype or p.q.dtype, memory_format=torch.contiguous_format) for x in grads)
    return (dq, dk2, dv2, dk, dv) if p.swapped else (dq, dk, dv, dk2, dv2)

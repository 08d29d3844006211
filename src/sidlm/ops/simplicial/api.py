"""The public function of 2-simplicial attention: checks its input, picks an implementation, is one node to autograd."""

import functools
import importlib
import math
import os
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensor

from sidlm.ops import dispatch
from sidlm.ops.simplicial import compensated, flops, prepare
from sidlm.ops.simplicial.reference import reference

FORMS = ("trilinear", "determinant")
BACKENDS = {"hopper": "hopper", "triton": "portable", "eager": "eager"}
"""Implementation -> module with its `forward` and `backward`; imported when first used, for triton may be missing."""


def _backend(impl: str):
    return importlib.import_module(f"sidlm.ops.simplicial.{BACKENDS[impl]}")


@torch.library.custom_op("sidlm::two_simplicial", mutates_args=())
def _two_simplicial(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None, impl: str = "eager", compensate: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = _backend(impl).forward
    run = functools.partial(compensated.forward, run) if compensate else run
    return run(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids)


@_two_simplicial.register_fake
def _(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, impl="eager", compensate=False):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.custom_op("sidlm::two_simplicial_backward", mutates_args=())
def _two_simplicial_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, out: Tensor,
    lse: Tensor, w1: int, w2: int, form: str, scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
    impl: str = "eager", compensate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run = _backend(impl).backward
    run = functools.partial(compensated.backward, run, impl in KERNELS) if compensate else run
    return run(grad_out, grad_lse, q, k, v, k2, v2, out, lse, w1, w2, form, scale, k2_bias, v2_bias, doc_ids)


@_two_simplicial_backward.register_fake
def _(
    grad_out, grad_lse, q, k, v, k2, v2, out, lse, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, impl="eager",
    compensate=False,
):  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, k2, v2))


def _setup_context(ctx, inputs, output):
    *tensors, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, impl, compensate = inputs
    ctx.save_for_backward(*tensors, *output, doc_ids)
    ctx.settings, ctx.how = (w1, w2, form, scale, k2_bias, v2_bias), (impl, compensate)


def _backward(ctx, grad_out, grad_lse):
    *saved, doc_ids = ctx.saved_tensors
    grads = (grad_out.contiguous(), grad_lse.contiguous())
    return *_two_simplicial_backward(*grads, *saved, *ctx.settings, doc_ids, *ctx.how), *(None,) * 9


_two_simplicial.register_autograd(_backward, setup_context=_setup_context)
flops.register_flop_formulas()


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _any_device(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


@torch.compiler.assume_constant_result
def _why_not_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """`prepare.why_not_hopper`; torch.compile asks it while it traces, and does not put its calls into the graph."""
    return prepare.why_not_hopper(device, dtype)


@torch.compiler.assume_constant_result
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """`prepare.why_not_triton`, likewise."""
    return prepare.why_not_triton(device, dtype)


def emulated(device: torch.device) -> bool:
    """Whether kernels do not run on the device itself, if they run at all."""
    return device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _through(impl: str):
    return functools.partial(_two_simplicial, impl=impl)


IMPLEMENTATIONS = {
    "hopper": dispatch.Implementation(_through("hopper"), _why_not_hopper, emulated),
    "triton": dispatch.Implementation(_through("triton"), _why_not_triton, emulated),
    "eager": dispatch.Implementation(_through("eager"), _any_device),
    "reference": dispatch.Implementation(reference, _any_device),
}
KERNELS = ("hopper", "triton")
LARGEST_HEAD = 256
"""Dimensions of a head up to which the kernels have tiles."""


def choose(op: str, impls: Mapping[str, dispatch.Implementation], impl: str | None, x: Tensor) -> str:
    """The implementation to run for heads x (..., D): that of `dispatch.choose`, but no kernel unasked for large D."""
    name = dispatch.choose(op, impls, impl, x.device, x.dtype)
    return "eager" if impl is None and name in KERNELS and x.shape[-1] > LARGEST_HEAD else name


def check_window(window: object) -> None:
    """ValueError unless it is two positive integers."""
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(isinstance(w, int) for w in window):
        raise ValueError(f"window is {window!r}, but must be two integers (w1, w2)")
    for i, w in enumerate(window):
        if w < 1:
            raise ValueError(f"window[{i}] is {w}, but must be at least 1")


def _check(q: Tensor, others: dict[str, Tensor], form: str, doc_ids: Tensor | None) -> None:
    """ValueError naming the argument and the two values that disagree; the same for every implementation."""
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, D), got shape {tuple(q.shape)}")
    batch, steps, heads, dim = q.shape
    k, k2 = others["k"], others["k2"]
    for name, x in others.items():
        if x.ndim != 4:
            raise ValueError(f"{name} must be (B, S, G, D), got shape {tuple(x.shape)}")
        for label, index, expected in (("batch size", 0, batch), ("G", 2, k.shape[2]), ("D", 3, dim)):
            if x.shape[index] != expected:
                raise ValueError(f"{name} has {label} {x.shape[index]}, expected {expected} (q {tuple(q.shape)})")
        if x.shape[1] < steps:
            raise ValueError(f"{name} has {x.shape[1]} positions, fewer than the {steps} of q")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    for name, x, partner in (("v", others["v"], k), ("v2", others["v2"], k2)):
        if x.shape[1] != partner.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} positions, but k{name[1:]} has {partner.shape[1]}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"q has {heads} heads, not a multiple of the {k.shape[2]} heads of k")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, but must be one of {', '.join(FORMS)}")
    if doc_ids is not None:
        _check_doc_ids(doc_ids, (batch, max(k.shape[1], k2.shape[1])), q.device)


def readable(x: Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph, and there are values at all."""
    on_host = x.device.type == "cpu" and not isinstance(x, FakeTensor)
    return on_host and not torch.compiler.is_compiling() and not maybe_current_level()


def _check_doc_ids(doc_ids: Tensor, expected: tuple[int, int], device: torch.device) -> None:
    if tuple(doc_ids.shape) != expected:
        raise ValueError(f"doc_ids has shape {tuple(doc_ids.shape)}, expected {expected}")
    if doc_ids.is_floating_point() or doc_ids.device != device:
        raise ValueError(f"doc_ids is {doc_ids.dtype} on {doc_ids.device}, expected integers on {device}")
    if not readable(doc_ids):
        return
    wrong = (doc_ids >= 0) & (doc_ids < doc_ids.cummax(dim=1).values)
    if bool(wrong.any()):
        row, at = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"doc_ids must not decrease along a row: row {row} has {int(doc_ids[row, at])} at position {at} "
            f"after {int(doc_ids[row, :at].max())}"
        )


def holes(doc_ids: Tensor) -> Tensor:
    """Where a document goes on behind padding: bool (B, S) like doc_ids. The kernels see another document there."""
    behind = (doc_ids[:, 1:] >= 0) & (doc_ids[:, :-1] < 0)
    same = doc_ids[:, 1:] == doc_ids.cummax(dim=1).values[:, :-1]
    return torch.nn.functional.pad(behind & same, (1, 0))


def _check_holes(doc_ids: Tensor, impl: str) -> None:
    found = holes(doc_ids)
    if bool(found.any()):
        row, at = (int(x) for x in found.nonzero()[0])
        raise ValueError(
            f"doc_ids has padding inside a document: row {row} goes on with {int(doc_ids[row, at])} at position {at}, "
            f"which implementation {impl!r} would take for another document; impl='eager' does not"
        )


def two_simplicial_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s1 g d"],
    v: Float[Tensor, "b s1 g d"],
    k2: Float[Tensor, "b s2 g d"],
    v2: Float[Tensor, "b s2 g d"],
    *,
    window: tuple[int, int] = (512, 32),
    form: str = "trilinear",
    scale: float | None = None,
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    doc_ids: Int[Tensor, "b s"] | None = None,
    return_lse: bool = False,
    compensate: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "b t h d"] | tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t h"]]:
    """Causal sliding-window attention over pairs of keys ("Fast and Simplex", arXiv 2507.02754, sections 4 and 5).

    Query i sees the pairs (j, m) with j in (i - w1, i] and m in (i - w2, i]. With one joint softmax over all pairs,

        logit[i, j, m] = scale * sum_d q[i, d] k[j, d] (k2[m, d] + k2_bias)           form="trilinear"
        logit[i, j, m] = scale * sum_c det([q[i, c], k[j, c], k2[m, c] + k2_bias])    form="determinant", c: chunks of 3
        out[i] = sum_{j, m} softmax(logit)[i, j, m] * v[j] o (v2[m] + v2_bias)

    Args:
        q: queries (B, T, H, D), float64, float32, bfloat16 or float16.
        k, v: first keys and values (B, S1, G, D), S1 >= T, H a multiple of G; the heads of a group share them.
        k2, v2: second keys and values (B, S2, G, D), S2 >= T. All sequences end at the same position: S1 = S2 = T in
            training, longer when earlier positions come from a cache or from a neighbouring rank.
        window: (w1, w2), each at least 1.
        form: "trilinear" or "determinant"; the last D mod 3 dimensions of a determinant are a plain product.
        scale: factor of the logits, 1/sqrt(D) if None.
        k2_bias, v2_bias: constants added to k2 and v2; with k2 = 0, v2 = 0 and biases b, 1 the layer is sliding-window
            attention over k and v at scale b * scale.
        doc_ids: (B, max(S1, S2)) integers that do not decrease along a row, aligned at the end like the keys: no pair
            crosses a document. Negative ids are padding: never seen, and their own output is zero.
            Padding may lie inside a document, but not for "hopper" and "triton", which take what follows it for
            another document. They refuse it where doc_ids is on the host; on a device it is not looked for, which would
            wait for the device: name "eager" there, as Sid's models do behind prompts that are padded on the right.
        return_lse: also return the natural-log sum of exponentials over all pairs, (B, T, H), float32 (float64 for
            float64), -inf for padding queries. It is differentiable.
        compensate: multiply bfloat16 inputs as float16, scaled by powers of two: virtual queries, weights and what the
            gradients are made of are rounded to 11 bits instead of 8 (compensated.py). Nothing changes for other
            dtypes and for "reference".
        impl: name of an implementation ("hopper", "triton", "eager", "reference"); None takes the first that can run,
            a kernel only on a GPU.

    Returns:
        (B, T, H, D) in q's dtype, and the LSE if asked for.

    Raises:
        ValueError: shapes, dtypes, devices, windows or doc_ids that disagree, with the names and the two values;
            padding inside a document for a kernel, with row and position.
    """
    check_window(window)
    _check(q, {"k": k, "v": v, "k2": k2, "v2": v2}, form, doc_ids)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    name = choose("simplicial", IMPLEMENTATIONS, impl, q)
    if name in KERNELS and doc_ids is not None and readable(doc_ids):
        _check_holes(doc_ids, name)
    chosen, w1, w2 = IMPLEMENTATIONS[name], int(window[0]), int(window[1])
    settings = (w1, w2, form, scale, float(k2_bias), float(v2_bias), doc_ids)
    fine = {"compensate": True} if compensate and q.dtype == torch.bfloat16 and name in BACKENDS else {}
    out, lse = chosen.run(q, k, v, k2, v2, *settings, **fine)
    return (out, lse) if return_lse else out

"""What each task of benchmarks/sparse24.py times: variant -> function, which returns tensors to compare."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import _sparse24_data as data
import torch
from _sparse24_dense import FP8, Layer, bf16, rowwise, tensorwise
from _sparse24_rows import SPARSE_PRODUCTS, Task
from torch import Tensor

from sidlm.ops import squared_relu_ffn
from sidlm.ops.sparse24 import recipe
from sidlm.ops.sparse24.crossover import NEVER
from sidlm.ops.sparse24.packed import unpack
from sidlm.ops.sparse24.quantize import power_of_two_scale
from sidlm.ops.sparse24.quantize import quantize_rows as quantize_anywhere
from sidlm.ops.sparse24.steps import Steps

Variants = dict[str, Callable[[], tuple[Tensor, ...]]]
OURS = "sidlm 2:4"
"""As the library chooses by its crossovers, and three that are made to choose"""
PACKED, MIXED, UNPACKED = "sidlm 2:4 packed", "sidlm 2:4 weights dense", "sidlm 2:4 unpacked"
"""All sparse products; all but those of the weights' gradients; none"""
DENSE = "dense"
"""So the variants are named that compute the same without 2:4; SwiGLU is another function"""
BACKENDS = ("hopper", "cusparselt", "torchao")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Products by this backend whatever the number of tokens is; "" for what the library chooses."""
    before = os.environ.get("SID_IMPL")
    os.environ["SID_IMPL"] = f"sparse24_product={name},sparse24_product_fp8={name}" if name else ""
    try:
        yield
    finally:
        os.environ.pop("SID_IMPL")
        if before is not None:
            os.environ["SID_IMPL"] = before


@contextmanager
def crossovers(layer: Layer, tokens: int, weights: int) -> Iterator[None]:
    """Choices as if these were measured."""
    from sidlm.ops.sparse24 import backends, crossover, gpu

    def forget():
        gpu._preferred.cache_clear()
        backends._choose.cache_clear()

    before, device, (features, width) = crossover.TABLE, torch.cuda.get_device_name(), layer.w_in.shape
    known = [crossover.Crossover(device, fp8, features, width, tokens, tokens, weights) for fp8 in (False, True)]
    crossover.TABLE = (*known, *before)
    forget()
    try:
        yield
    finally:
        crossover.TABLE = before
        forget()


def choosing(layer: Layer, tokens: int, weights: int, function: Callable) -> Callable:
    def run():
        with crossovers(layer, tokens, weights):
            return function()

    return run


def within(name: str, function: Callable) -> Callable:
    def run():
        with backend(name):
            return function()

    return run


def steps_of(device: torch.device) -> Steps:
    if device.type == "cuda":
        from sidlm.ops.sparse24 import gpu as module
    else:
        from sidlm.ops.sparse24 import eager as module
    return module.steps()


def usable(device: torch.device, precision: str) -> list[str]:
    """Sparse backends of this machine for this precision."""
    if device.type != "cuda":
        return []
    from sidlm.ops.sparse24 import backends

    dtype = FP8 if precision == "fp8" else torch.bfloat16
    return [name for name in BACKENDS if backends.why_not(name, device, dtype) is None]


def ours(layer: Layer, precision: str, sparsity: str | None, step: bool) -> Callable[[], tuple[Tensor, ...]]:
    inputs = [t.detach().requires_grad_(step) for t in (layer.x, layer.w_in, layer.w_down)]

    def run() -> tuple[Tensor, ...]:
        out = squared_relu_ffn(*inputs, sparsity=sparsity, precision=precision)
        return (out.detach(), *torch.autograd.grad(out, inputs, layer.grad)) if step else (out,)

    return run


def layer_variants(task: Task, layer: Layer, seed: int) -> Variants:
    step, fp8, device = task.kind == "step", task.precision == "fp8", layer.x.device
    run_ours = ours(layer, task.precision, "2:4", step)
    found: Variants = {OURS: run_ours, UNPACKED: run_ours}
    if device.type == "cuda":
        found[UNPACKED] = choosing(layer, NEVER, NEVER, run_ours)
        if usable(device, task.precision):
            found[PACKED] = choosing(layer, 0, 0, run_ours)
            if step:
                found[MIXED] = choosing(layer, 0, NEVER, run_ours)
    found["dense sidlm"] = ours(layer, task.precision, None, step)
    if device.type != "cuda":
        return found
    other = data.swiglu(layer, seed)
    if not fp8:
        found["dense fused"] = lambda: bf16(layer, step)
        found["SwiGLU"] = lambda: bf16(other, step)
        return found
    run, run_other = tensorwise(layer), tensorwise(other)
    found["dense tensor-wise"] = lambda: run(step)
    run_sought = tensorwise(layer, sought=True)
    found["dense tensor-wise sought"] = lambda: run_sought(step)
    if not step:
        found["dense row-wise"] = lambda: rowwise(layer, step)
    found["dense row-wise fast"] = lambda: rowwise(layer, step, fast=True)
    found["SwiGLU tensor-wise"] = lambda: run_other(step)
    return found


class Operands:
    """Of the products of one step: dense, and packed as the implementation packs them."""

    def __init__(self, layer: Layer, fp8: bool, name: str):
        self.layer, self.fp8, self.steps = layer, fp8, steps_of(layer.x.device)
        x, grad, w_up, w_down, _ = layer
        self.y1, self.d_hidden = x @ w_up.T, grad @ w_down
        with backend(name):
            act, self.counts, _ = self.steps.pack_activation(self.y1, fp8, True, True)
            self.act = self.steps.opened(act)
            self.dact = self.steps.pack_gradient(self.d_hidden, self.act, fp8)
        self.sparse, self.dense, _ = recipe.split(self.counts, 0.05)
        self.perm = recipe.token_order(len(x), x.device, True)
        multiple = self.steps.token_multiple
        self.length = -(-len(x) // multiple) * multiple

    def packings(self) -> Variants:
        """Packing -> its kernels."""
        s, x, fp8 = self.steps, self.layer.x, self.fp8
        order = (self.sparse, self.perm, self.length)
        found = {
            "activation": lambda: s.pack_activation(self.y1, fp8, False, False),
            "gradient": lambda: s.pack_gradient(self.d_hidden, self.act, fp8),
            "transposed activation": lambda: s.transpose_pack(self.act, *order, "value", fp8),
            "transposed gradient": lambda: s.transpose_pack(self.dact, *order, "magnitude", fp8),
            "transposed rows": lambda: s.transpose_rows(x, self.perm, self.length, fp8),
        }
        return found | ({"rows": lambda: quantize(x)} if fp8 else {})

    def unpacked(self, p) -> Tensor:
        """The dense matrix (T, F) in bf16, scaled."""
        if self.layer.x.device.type != "cuda":
            return unpack(p).to(self.layer.x.dtype)
        from sidlm.ops.sparse24 import gpu, products

        packed = gpu.opened(p).for_kernels
        dense = products.dense_values(packed)
        return dense if packed.scale is None else (dense.float() * packed.scale[:, None]).bfloat16()

    def of(self, product: str) -> tuple[Tensor, Tensor]:
        """a (M, K) and b (N, K) in bf16, as views of what a layer has; sparse where the sparse layer's are."""
        x, grad, w_up, w_down, _ = self.layer
        return {
            "up": lambda: (x, w_up),
            "down": lambda: (self.unpacked(self.act), w_down),
            "d_hidden": lambda: (grad, w_down.T),
            "d_x": lambda: (self.unpacked(self.dact), w_up.T),
            "d_w_down": lambda: (self.unpacked(self.act).T, grad.T),
            "d_w_up": lambda: (self.unpacked(self.dact).T, x.T),
        }[product]()

    def sparse_product(self, product: str) -> Callable[[], tuple[Tensor, ...]]:
        """The same by the implementation: along tokens a sparse and a dense part, whose operands are packed before."""
        s, fp8 = self.steps, self.fp8
        x, grad, w_up, w_down, _ = self.layer
        if product in ("down", "d_x"):
            p, b = (self.act, w_down) if product == "down" else (self.dact, w_up.T)
            b = quantize(b) if fp8 else b
            return lambda: (s.sparse_matmul(p, b, fp8),)
        left, right, by = (self.act, grad, "value") if product == "d_w_down" else (self.dact, x, "magnitude")
        b = s.transpose_rows(right, self.perm, self.length, fp8)
        packed, _ = s.transpose_pack(left, self.sparse, self.perm, self.length, by, fp8)
        a = s.transpose_dense(left, self.dense, self.perm, self.length, fp8)
        parts = [(self.sparse, packed), (self.dense, a)]
        into = torch.empty_like(w_up if product == "d_w_up" else w_down.T)

        def run() -> tuple[Tensor, ...]:
            s.products_into(into, parts, b, fp8)
            return (into,)

        return run


def gemm_variants(task: Task, layer: Layer) -> Variants:
    """Products of operands that are there: neither packing nor quantising is in these rows."""
    fp8, device = task.precision == "fp8", layer.x.device
    names = (usable(device, task.precision) or [""]) if task.what in SPARSE_PRODUCTS else []
    a, b = Operands(layer, fp8, names[0] if names else "").of(task.what)
    if fp8 and device.type == "cuda":
        found = dense_fp8(a, b)
    else:
        found: Variants = {f"{DENSE} {task.precision}": lambda: (a @ b.T,)}
    for n, name in enumerate(names):
        operands = Operands(layer, fp8, name)
        with backend(name):
            found[OURS if n == 0 else f"{OURS} ({name})"] = within(name, operands.sparse_product(task.what))
    return found


def dense_fp8(a: Tensor, b: Tensor) -> Variants:
    kinds = {}
    (a8, sa), (b8, sb) = quantize(a), quantize(b)
    kinds["row-wise"] = a8, b8, sa[:, None], sb[None]
    ta, tb = (power_of_two_scale(x.abs().amax()) for x in (a, b))
    kinds["tensor-wise"] = *((x / s).to(FP8).contiguous() for x, s in ((a, ta), (b, tb))), ta, tb

    def multiply(kind: str, fast: bool) -> Callable[[], tuple[Tensor, ...]]:
        x, y, *scales = kinds[kind]
        return lambda: (torch._scaled_mm(x, y.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast),)

    return {f"{DENSE} {k}{' fast' if fast else ''}": multiply(k, fast) for k in kinds for fast in (False, True)}


def pack_variants(task: Task, layer: Layer) -> Variants:
    fp8, device = task.precision == "fp8", layer.x.device
    name = (usable(device, task.precision) or [""])[0]
    operands = Operands(layer, fp8, name)
    packing = operands.packings()[task.what]
    variants: Variants = {OURS: within(name, lambda: (packing(), ())[1])}
    if task.what == "activation" and device.type == "cuda":
        # what torch has for it: it takes what is 2:4 already, and neither selects nor scales
        dense = operands.unpacked(operands.act)
        dense = quantize(dense)[0] if fp8 else dense
        variants["torch._cslt_compress"] = lambda: (torch._cslt_compress(dense), ())[1]
    return variants


def bytes_of(name: str, tokens: int, width: int, features: int, dense: int, fp8: bool) -> int:
    """What a packing has to read and write at least, its operands being bf16 and each read once."""
    size = 1 if fp8 else 2
    packed = size * 4 + 1  # of 8 elements
    all_, sparse = tokens * features // 8, tokens * (features - dense) // 8
    return {
        "activation": (16 + packed) * all_,
        "gradient": (16 + 2 * packed) * all_,
        "transposed activation": 2 * packed * sparse,
        "transposed gradient": 2 * packed * sparse,
        "rows": tokens * width * (2 + size),
        "transposed rows": tokens * width * (2 + size),
    }[name]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cuda":
        return quantize_anywhere(x)
    from sidlm.ops.sparse24.triton_quantize import quantize_rows

    return quantize_rows(x.contiguous())

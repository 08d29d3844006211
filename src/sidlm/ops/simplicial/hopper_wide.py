"""Kernels over virtual queries in CUDA C++ for wide groups: 16, 32, ... query heads share a key head.

hopper_wide.cuh says how the rows of a tile are laid out so that virtual queries are formed, and sums over the offsets
taken, in the registers of the warpgroups that multiply. The Gluon kernels serve the other groups, the determinant's
gradient of q and the gradients of the keys.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sidlm.ops import nvrtc
from sidlm.ops.simplicial.hopper_tiles import processors
from sidlm.ops.simplicial.prepare import LOG2E, Problem

HEADS = 16  # of a block of threads
HAS_CUDA_BINDINGS = all(importlib.util.find_spec(name) for name in ("cuda", "cuda.bindings"))


class Variant(NamedTuple):
    """What is compiled: the constants of the kernels; hopper_wide.cuh says what they mean."""

    d: int
    fp16: bool
    out_fp16: bool
    determinant: bool
    k2_bias: bool
    v2_bias: bool
    has_docs: bool
    backward: bool
    cluster: int
    slots: int

    @property
    def keys(self) -> int:
        """Keys of a block; the backward pass has both keys and values of half as many in a slot."""
        return 64 if self.backward else 128

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block of threads."""
        copies, sets = 1 + self.determinant, 1 + (self.determinant or self.backward)
        stage = (8 * (copies + 1) + HEADS * sets) * (2 * self.d + 16) + 16 + 8 * HEADS * self.backward
        return (self.slots + 1) * 256 * self.d + 3 * stage + 512 + 16 * self.slots + 48

    @property
    def source(self) -> str:
        return _source(self)


@functools.cache
def _source(variant: Variant) -> str:
    constants = {**variant._asdict(), "keys": variant.keys}
    products = (_multiply("keys", variant.keys, variant.fp16), _multiply("d", variant.d, variant.fp16))
    kernel = "hopper_wide_backward.cu" if variant.backward else "hopper_wide_forward.cu"
    common, passes, entry = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("hopper_wide.cuh", kernel, "hopper_wide_entry.cuh")
    )
    return nvrtc.assembled(constants, common, *products, passes, entry)


def _multiply(name: str, columns: int, fp16: bool) -> str:
    """One wgmma: 64 rows from registers by 16 columns or, turned, rows of keys or values, onto accumulators."""
    n, kind = columns // 2, "f16" if fp16 else "bf16"
    registers = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(n))
    return f"""
template <int TURNED> __device__ __forceinline__ void multiply_{name}(
    float (&c)[{n}], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b, int add) {{
  asm volatile("{{.reg .pred add; setp.ne.b32 add, %{n + 5}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
    "{{{registers}}}, {{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, add, 1, 1, %{n + 6};}}"
    : {outputs} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(TURNED));
}}
"""


def takes(p: Problem) -> bool:
    """Whether groups are wide enough, and kernels can be compiled; hopper.takes says the rest."""
    return HAS_CUDA_BINDINGS and p.shape[5] % HEADS == 0


def _run(p: Problem, scale: float, reach: Tensor | None, out: Tensor, lse: Tensor, backward: tuple, how: dict) -> None:
    """Launch a pass. backward: gradient of the output and delta, or nothing."""
    batch, steps, s1, s2, groups, per_group, dim = p.shape
    slots = 4 if p.determinant or backward else 5  # what shared memory holds
    variant = Variant(
        d=dim, fp16=p.q.dtype == torch.float16, out_fp16=out.dtype == torch.float16, determinant=p.determinant,
        k2_bias=p.k2_bias != 0, v2_bias=p.v2_bias != 0, has_docs=reach is not None, backward=bool(backward),
        cluster=1 if backward or per_group % (2 * HEADS) else 2, slots=slots,
    )._replace(**how)  # fmt: skip
    (q, qb), (k2, k2b) = p.right(p.q), p.left(p.k2)
    second, delta = backward or (qb, None)
    box = (128, variant.keys // variant.cluster)
    maps = [nvrtc.tensor_map(x.view(batch * s1, groups * dim), box, 128) for x in (p.k, p.v)]
    jobs = batch * groups * steps * per_group // (HEADS * variant.cluster)
    blocks = variant.cluster * min(jobs, processors(out.device) // variant.cluster)
    sizes = [steps, s1, s2, p.w1, p.w2, per_group, groups, jobs]
    numbers = [scale * LOG2E, scale, p.k2_bias, p.v2_bias]
    kernel = nvrtc.function(variant.source, "run", variant.shared, out.device.index or 0)
    args = [*maps, q, second, k2, k2b, p.v2, out, lse, delta, reach, *sizes, *numbers]
    with torch.cuda.device_of(out):
        nvrtc.launch(kernel, blocks, 384, variant.shared, args)


def forward(
    p: Problem, scale: float, reach: Tensor | None, dtype: torch.dtype | None = None, **how
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) in dtype (q's) and natural-log LSE (B, T, H). D 64 or 128, scale > 0.

    how: fields of `Variant`.
    """
    out = torch.empty_like(p.q, dtype=dtype)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    _run(p, scale, reach, out, lse, (), how)
    return out, lse


def backward(
    p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None,
    dtype: torch.dtype | None = None, **how,
) -> Tensor:  # fmt: skip
    """Gradient of q (B, T, H, D) in dtype (q's) of the trilinear form. delta (B, T, H): sums of dO o O."""
    dq = torch.empty_like(p.q, dtype=dtype)
    _run(p, scale, reach, dq, lse, (grad_out, delta), how)
    return dq

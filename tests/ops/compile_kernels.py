"""Compile the Triton and Gluon kernels of 2-simplicial attention for a target, with no device, and print JSON.

    python tests/ops/compile_kernels.py sm_90 [gfx942 ...] [--dim 64 128] [--dtype bfloat16] [--docs]
    python tests/ops/compile_kernels.py sm_90 --kernel hopper_forward hopper_queries -- sm_80 --kernel decode merge

The configurations are the ones the launchers choose (the `plan` functions, on meta tensors), specialised by the code
that specialises a launch. For NVIDIA targets the binary is disassembled with the tools that Triton brings. A process of
its own, since TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
from sass import disassemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from sidlm.ops.simplicial import (
    hopper,
    hopper_backward_keys,
    hopper_backward_queries,
    hopper_forward,
    hopper_narrow,
    hopper_narrow_keys,
    hopper_narrow_queries,
    permute,
    prepare,
    triton_backward,
    triton_backward_keys,
    triton_decode,
    triton_forward,
)

Launches = Iterator[tuple[str, prepare.Launch]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Case(NamedTuple):
    """One problem, self-attention over `steps` positions or one decoding step."""

    arch: str
    dim: int
    form: str
    dtype: torch.dtype
    docs: bool
    window: tuple[int, int]
    heads: tuple[int, int]  # H and G
    steps: int
    bias: tuple[float, float]  # of k2 and of v2

    @property
    def settings(self) -> tuple[int, int, str, float, float]:
        return (*self.window, self.form, *self.bias)


def training(case: Case) -> Launches:
    """Every launch of one forward and one backward pass, of the portable kernels and of those for Hopper."""
    arch, dim, steps, (heads, groups), batch = case.arch, case.dim, case.steps, case.heads, 1 if case.steps == 1 else 2
    q, grad, out, dq = (empty(batch, steps, heads, dim, dtype=case.dtype) for _ in range(4))
    k, v, k2, v2 = (empty(batch, steps, groups, dim, dtype=case.dtype) for _ in range(4))
    lse, delta = (empty(batch, steps, heads) for _ in range(2))
    doc_ids = empty(batch, steps, dtype=torch.long) if case.docs else None
    scale = dim**-0.5
    p = prepare.problem(q, k, v, k2, v2, *case.settings)
    yield "forward", triton_forward.plan(p, scale, doc_ids, out, lse, arch)
    if p.determinant:
        yield "copies", permute.plan(q, out, dq, p.swapped, 0)
    yield "delta", triton_backward.plan_delta(grad, lse, out, delta)
    yield "queries", triton_backward.plan_queries(p, scale, doc_ids, grad, lse, delta, dq, arch)
    cut = triton_backward_keys.cut(p, arch)
    kinds, count = 3 if p.determinant else 2, cut.bg_count
    one, two = (empty(kinds, slots, count, steps, dim) for slots in (cut.slots, cut.slots2))
    tensors = triton_backward_keys.key_tensors(p, doc_ids, grad, lse, delta)
    yield "keys", triton_backward_keys.plan_keys(p, cut, scale, tensors, (one, two), 0, count, case.docs, arch)

    p = hopper._problem(q, k, v, k2, v2, *case.settings)
    if arch != "sm_90" or not hopper.takes(p, scale, doc_ids):
        return
    reach = prepare.reach(doc_ids, steps)
    last = None if doc_ids is None else prepare.extents(doc_ids, steps)[1]
    yield "hopper_forward", hopper_forward.plan(p, scale, reach, out, lse)
    dqs = hopper_backward_queries.outputs(p)
    yield "hopper_queries", hopper_backward_queries.plan(p, scale, grad, lse, delta, reach, dqs)
    shares = hopper_backward_keys.cut(p)
    sums = hopper_backward_keys.partial_sums(p, shares)
    yield "hopper_keys", hopper_backward_keys.plan(p, shares, scale, grad, lse, delta, last, sums)
    if hopper_narrow.takes(p):
        shares, sums = hopper_narrow_queries.cut(p), hopper_narrow_queries.partial_sums(p)
        launch = hopper_narrow_queries.plan(p, shares, scale, grad, lse, delta, reach, dqs, sums)
        yield "hopper_narrow_queries", launch
        cut = hopper_narrow_keys.cut(p)
        sums = hopper_narrow_keys.partial_sums(p, cut, case.docs)
        yield "hopper_narrow_keys", hopper_narrow_keys.plan(p, cut, scale, grad, lse, delta, reach, sums)


def decoding(case: Case) -> Launches:
    """The launches of one decoding step at batch 1, on rings as long as the windows."""
    (w1, w2), (heads, groups) = case.window, case.heads
    q, out = (empty(1, 1, heads, case.dim, dtype=case.dtype) for _ in range(2))
    k, v, k2, v2 = (empty(1, slots, groups, case.dim, dtype=case.dtype) for slots in (w1, w1, w2, w2))
    lengths, lse = empty(1, dtype=torch.long), empty(1, 1, heads)
    doc_ids = empty(1, w1 + w2, dtype=torch.long) if case.docs else None
    launches = triton_decode.launches(
        q, k, v, k2, v2, lengths, w1, w2, case.form, case.dim**-0.5, *case.bias, doc_ids, out, lse, case.arch
    )
    yield from zip(("decode", "merge"), launches, strict=False)


def source(launch: prepare.Launch, target: GPUTarget) -> tuple[ASTSource, dict]:
    """The kernel as a launch specialises it (aligned pointers, multiples of 16, ones as constants), and its options."""
    kernel, backend = launch.kernel, make_backend(target)
    given = {**launch.args, **launch.constants, **launch.options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**given)
    options, *parts = kernel._pack_args(backend, given, bound, specialization, options)
    return (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, *parts), options.__dict__


def gpu_target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_launch(launch: prepare.Launch, arch: str) -> dict:
    start, target = time.perf_counter(), gpu_target(arch)
    made, options = source(launch, target)
    compiled = triton.compile(made, target=target, options=options)
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps, "stages": launch.num_stages}
    if getattr(compiled.metadata, "tmem_size", None):
        found["tensor_memory"] = compiled.metadata.tmem_size
    found["seconds"] = round(time.perf_counter() - start, 2)
    if arch.startswith("sm_"):
        found |= disassemble(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        for name, key in (("registers", "vgpr_count"), ("spills", "vgpr_spill_count")):
            found[name] = int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])
        found["spills_in_loops"] = found["spills"]
        found["MFMA"] = len(re.findall(r"v_mfma", text))
    return found


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="+")
    parser.add_argument("--dim", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--form", nargs="+", default=["trilinear", "determinant"])
    parser.add_argument("--window", type=int, nargs=2, default=(512, 32))
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), help="H and G")
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--bias", type=float, nargs=2, default=(0.5, 1.0), help="of k2 and v2")
    parser.add_argument("--kernel", nargs="+", default=["forward", "queries", "keys"])
    parser.add_argument("--docs", action="store_true")
    return parser


def report(options: argparse.Namespace) -> None:
    for arch, dim, form in product(options.archs, options.dim, options.form):
        problem = (getattr(torch, options.dtype), options.docs, options.window, options.heads, options.steps)
        case = Case(arch, dim, form, *problem, options.bias)
        for name, launch in (*training(case), *decoding(case)):
            if name in options.kernel:
                row = {"arch": arch, "dim": dim, "form": form, "docs": case.docs, "heads": case.heads, "kernel": name}
                print(json.dumps(row | compile_launch(launch, arch)), flush=True)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    words = sys.argv[1:]
    while words:
        end = (*words, "--").index("--")
        report(arguments().parse_args(words[:end]))
        words = words[end + 1 :]


if __name__ == "__main__":
    main()

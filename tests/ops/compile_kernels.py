"""Compile the Triton kernels of 2-simplicial attention for a target, with no device, and print what came out as JSON.

    python tests/ops/compile_kernels.py sm_90 [gfx942 ...] [--dim 64 128] [--dtype bfloat16] [--docs]

The configurations are the ones the launchers choose (the `plan` functions, on meta tensors). For NVIDIA targets the
binary is disassembled with the tools that Triton brings: registers, stack, instructions that spill, tensor-core
instructions. A process of its own, since TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sidlm.ops.simplicial import prepare, triton_backward, triton_backward_keys, triton_forward

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SPILL = r"\b(?:STL|LDL)\b"
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")


def plans(arch: str, *, dim: int, dtype: torch.dtype, form: str, docs: bool, window, heads, groups, steps):
    """Every launch of one forward and one backward pass."""
    batch = 1 if steps == 1 else 2
    q, grad, out, dq = (torch.empty(batch, steps, heads, dim, dtype=dtype, device="meta") for _ in range(4))
    k, v, k2, v2 = (torch.empty(batch, steps, groups, dim, dtype=dtype, device="meta") for _ in range(4))
    lse, delta = (torch.empty(batch, steps, heads, device="meta") for _ in range(2))
    doc_ids = torch.empty(batch, steps, dtype=torch.long, device="meta") if docs else None
    scale = dim**-0.5
    p = prepare.problem(q, k, v, k2, v2, *window, form, 0.5, 1.0)
    yield "forward", triton_forward.plan(p, scale, doc_ids, out, lse, arch)
    yield "delta", triton_backward.plan_delta(grad, lse, out, delta)
    yield "queries", triton_backward.plan_queries(p, scale, doc_ids, grad, lse, delta, dq, arch)
    cut = triton_backward_keys.cut(p, arch)
    kinds, count = 3 if p.determinant else 2, cut.bg_count
    one, two = (
        torch.empty(kinds, slots, count, steps, dim, device="meta", dtype=torch.float32)
        for slots in (cut.slots, cut.slots2)
    )
    tensors = triton_backward_keys.key_tensors(p, doc_ids, grad, lse, delta)
    yield "keys", triton_backward_keys.plan_keys(p, cut, scale, tensors, (one, two), 0, count, docs, arch)


def source(launch: prepare.Launch) -> ASTSource:
    """The kernel specialised as a launch specialises it: aligned pointers, multiples of 16, ones as constants."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.args.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, int) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def gpu_target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def innermost_loops(sass: str) -> list[str]:
    """The instructions of every innermost loop that holds tensor-core instructions."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    at = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    back = []
    for n, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA(?:\.U)?\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            back.append((at[int(jump[1], 16)], n))
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    bodies = ["\n".join(text for _, text in lines[a : b + 1]) for a, b in inner]
    return [body for body in bodies if any(name in body for name in MATRIX)]


def disassemble(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes, spilling instructions and tensor-core instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "spills": len(re.findall(SPILL, sass)),
        "spills_in_loops": max((len(re.findall(SPILL, body)) for body in innermost_loops(sass)), default=0),
        "cp_async": len(re.findall(r"\bLDGSTS\b", sass)),
    }
    return found | {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX if re.search(rf"\b{name}\b", sass)}


def compile_launch(launch: prepare.Launch, arch: str) -> dict:
    start = time.perf_counter()
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source(launch), target=gpu_target(arch), options=options)
    found = {"shared": compiled.metadata.shared, "warps": launch.num_warps, "stages": launch.num_stages}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="+")
    parser.add_argument("--dim", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--form", nargs="+", default=["trilinear", "determinant"])
    parser.add_argument("--window", type=int, nargs=2, default=(512, 32))
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), help="H and G")
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--kernel", nargs="+", default=["forward", "queries", "keys"])
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    for arch in options.archs:
        for dim in options.dim:
            for form in options.form:
                settings = {"dim": dim, "dtype": getattr(torch, options.dtype), "form": form, "docs": options.docs}
                settings |= {"window": options.window, "steps": options.steps}
                settings["heads"], settings["groups"] = options.heads
                for name, launch in plans(arch, **settings):
                    if name in options.kernel:
                        row = {"arch": arch, "dim": dim, "form": form, "kernel": name}
                        print(json.dumps(row | compile_launch(launch, arch)), flush=True)


if __name__ == "__main__":
    main()

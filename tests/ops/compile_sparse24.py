"""Compile the Triton kernels of 2:4 sparsity for a target, with no device, and print JSON.

    python tests/ops/compile_sparse24.py sm_90 [--tokens 8192] [--features 21504] [--dtype float16] [--layout ...]
    python tests/ops/compile_sparse24.py sm_90 --kernel pack_fp8 gradient -- gfx942 --kernel pack

Besides what compile_kernels.py tells of a kernel: how many loads and stores of global memory there are by width.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator

import torch
import triton
from compile_kernels import compile_launch, empty, gpu_target, source

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24 import (
    triton_features,
    triton_gradient,
    triton_masked,
    triton_pack,
    triton_split,
    triton_thin,
    triton_transpose,
    triton_turn,
)
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.recipe import Split
from sidlm.ops.sparse24.triton_groups import in_pairs

DENSE, MODEL = 1088, 4096
"""Dense features, columns of x"""


def packed(rows: int, columns: int, dtype: torch.dtype) -> Packed:
    values, metadata = empty(rows, columns // 2, dtype=dtype), empty(rows, columns // 8, dtype=torch.uint8)
    return Packed(values, metadata, empty(rows) if dtype == FP8 else None)


def launches(arch: str, T: int, F: int, dtype: torch.dtype, layout: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of one forward and one backward pass, in 16 bits and in fp8."""
    y, length = empty(T, F, dtype=dtype), -(-T // 8) * 8
    counts, totals, bits, to = empty(F, dtype=torch.int32), *(empty(n, dtype=torch.int32) for n in (2, F, F))
    perm, some = empty(T, dtype=torch.int64), empty(DENSE, dtype=torch.int64)
    x, of_x = empty(T, MODEL, dtype=dtype), empty(MODEL, dtype=torch.int32)
    for fp8, suffix in ((False, ""), (True, "_fp8")):
        kind = FP8 if fp8 else dtype
        act, out, scale = packed(T, F, kind), packed(F - DENSE, length, kind), empty(DENSE) if fp8 else None
        known, known_x = (bits, of_x) if fp8 else (None, None)
        yield "pack" + suffix, triton_pack.plan(y, act, counts, totals, layout, arch)
        yield "gradient" + suffix, triton_gradient.plan(y, act, empty(T, F // 2, dtype=kind), act.scale, layout, arch)
        for by in ("value", "magnitude"):
            plan = triton_transpose.plan_pack(act, to, perm, known, out, totals, by, layout, arch)
            yield f"transpose_{by}{suffix}", plan
        dense = empty(DENSE, length, dtype=kind)
        yield "dense" + suffix, triton_transpose.plan_dense(act, some, perm, known, dense, scale, layout)
        rows, scale = empty(MODEL, length, dtype=kind), empty(MODEL) if fp8 else None
        yield "rows" + suffix, triton_transpose.plan_rows(x, None, perm, known_x, rows, scale)
        if fp8 and in_pairs(arch, torch.bfloat16):
            for by in ("value", "magnitude"):
                plan = triton_turn.plan(act, to, perm, bits, out.values, out.metadata, out.scale, totals, by)
                yield f"turn_pack_{by}_fp8", plan
        if fp8:
            yield "features_fp8", triton_features.plan_features(act, counts, bits, layout, arch)
            yield "columns_fp8", triton_features.plan_columns(x, of_x)
        yield from masked(arch, y, act, perm, known, suffix)
    yield (
        "split",
        triton_split.plan(counts, Split(empty(F - DENSE, dtype=torch.int64), some, empty(F, dtype=torch.uint8)), T),
    )


def masked(
    arch: str, y: torch.Tensor, act: Packed, perm: torch.Tensor, bits: torch.Tensor | None, suffix: str
) -> Iterator[tuple[str, Launch]]:
    """Those that pack nothing."""
    (T, F), kind, fp8 = y.shape, act.values.dtype, bits is not None
    out, counts, totals = empty(T, F, dtype=kind), empty(F, dtype=torch.int32), empty(2, dtype=torch.int32)
    yield "mask" + suffix, triton_masked.plan_activation(y, out, act.scale, counts, totals, arch)
    yield "mask_gradient" + suffix, triton_masked.plan_gradient(y, out, act.scale, out, act.scale, arch)
    every, scale = empty(F, dtype=torch.uint8), empty(F) if fp8 else None
    thin = empty(F, T, dtype=kind) if fp8 else out
    yield "thin" + suffix, triton_thin.plan(act, every, perm, bits, thin, scale, totals, "magnitude", "plain", arch)
    if fp8 and in_pairs(arch, torch.bfloat16):
        yield "turn_thin_fp8", triton_turn.plan(act, every, perm, bits, thin, None, scale, totals, "magnitude")
    if fp8:
        whole = Packed(out, empty(0, 0, dtype=torch.uint8), act.scale)
        yield "features_whole_fp8", triton_features.plan_features(whole, counts, bits, None, arch)
        yield "turned_whole_fp8", triton_transpose.plan_rows(out, act.scale, perm, bits, thin, scale)


def widths(launch: Launch, arch: str) -> dict[str, int]:
    """Instructions that load and store global memory, by the bits of a thread."""
    made, options = source(launch, gpu_target(arch))
    ptx = triton.compile(made, target=gpu_target(arch), options=options).asm["ptx"]  # from the cache
    found = Counter()
    for name, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx):
        found[f"{name}_{int(vector or 1) * int(bits)}"] += 1
    return dict(found)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="+")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, default=21504)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layout", default="plain")
    parser.add_argument("--kernel", nargs="+", help="all if none is named")
    return parser


def report(options: argparse.Namespace) -> None:
    for arch in options.archs:
        dtype = getattr(torch, options.dtype)
        for name, launch in launches(arch, options.tokens, options.features, dtype, options.layout):
            if options.kernel is None or name in options.kernel:
                asked = {"arch": arch, "features": options.features, "dtype": options.dtype, "layout": options.layout}
                row = {**asked, "kernel": name, "grid": launch.grid, **compile_launch(launch, arch)}
                if arch.startswith("sm_"):
                    row |= widths(launch, arch)
                print(json.dumps(row), flush=True)


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

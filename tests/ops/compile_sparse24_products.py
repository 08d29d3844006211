"""Compile the Triton kernels around the 2:4 sparse products for a target, with no device, and print JSON.

python tests/ops/compile_sparse24_products.py sm_90 sm_80
"""

import json
import os
import sys
from collections.abc import Iterator

import torch
from compile_kernels import compile_launch, empty
from compile_sparse24 import widths

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24 import triton_quantize, triton_relayout, triton_rescale, triton_unpack
from sidlm.ops.sparse24.products import Product
from sidlm.ops.sparse24.quantize import FP8

T, F, D, DENSE = 8192, 21504, 4096, 1088
BF16, BYTE = torch.bfloat16, torch.uint8


def launches(arch: str) -> Iterator[tuple[str, Launch]]:
    metadata = empty(T, F // 8, dtype=BYTE)
    for layout in triton_relayout.KERNELS:
        for back in (False, True):
            yield f"{layout}{' back' if back else ''}", triton_relayout.plan(metadata, metadata, layout, back)
    product, second = empty(F - DENSE, D, dtype=BF16), empty(DENSE, D, dtype=BF16)
    source, scaled = empty(F, dtype=torch.int32), Product(product, empty(F - DENSE), empty(D))
    yield "place", triton_rescale.plan(scaled, second, source, empty(F, D, dtype=BF16))
    yield "place turned", triton_rescale.plan(Product(product), second, source, empty(D, F, dtype=BF16).T)
    yield "rescaled", triton_rescale.plan(scaled, None, None, product)
    yield "unpack", triton_unpack.plan(empty(T, F // 2, dtype=BF16), metadata, None, empty(T, F, dtype=BF16))
    if arch != "sm_80":  # has no e4m3
        for name, x in (("quantize", empty(T, D, dtype=BF16)), ("quantize wide", empty(D, F, dtype=BF16))):
            yield name, triton_quantize.plan(x, empty(*x.shape, dtype=FP8), empty(len(x)), arch)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    for arch in sys.argv[1:]:
        for name, launch in launches(arch):
            print(json.dumps({"arch": arch, "kernel": name, **compile_launch(launch, arch), **widths(launch, arch)}))


if __name__ == "__main__":
    main()

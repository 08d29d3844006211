"""2:4 sparse products by cuSPARSELt: 16 bits and e4m3, through the functions torch has for it."""

import functools
from typing import Any

import torch
from torch import Tensor

from sidlm.ops.sparse24 import algorithms
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.products import Product, dense_values, difference, reads_metadata
from sidlm.ops.sparse24.quantize import FP8

LAYOUTS = {2: "cusparselt_16bit", 1: "cusparselt_8bit"}
"""Bytes of a value -> layout of the metadata"""
DTYPES = (torch.bfloat16, torch.float16, FP8)
ROWS_CHECKED = 256
TOLERANCE = 0.02
"""Of a row, relative L2: four times what rounding to bfloat16 leaves, a tenth of what one wrong tile does."""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 and float8_e4m3fn, not {dtype}"
    if reason := reads_metadata(device):
        return reason
    return None if torch.backends.cusparselt.is_available() else "this build of torch has no cuSPARSELt"


def blob(p: Packed) -> Tensor:
    """Values and behind them the metadata, as one matrix (M, ...) of values' dtype; a view of them if they lie so."""
    values, metadata = p.values, p.metadata
    shape = len(values), values.shape[1] + metadata.numel() // len(values) // values.itemsize
    adjacent = metadata.data_ptr() == values.data_ptr() + values.nbytes
    if adjacent and metadata.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        return values.as_strided(shape, (shape[1], 1))
    return (
        torch.cat([x.contiguous().view(torch.uint8).flatten() for x in (values, metadata)])
        .view(values.dtype)
        .view(shape)
    )


@functools.cache
def _machine(device: torch.device) -> str:
    version = torch.backends.cusparselt.version()
    return f"{torch.cuda.get_device_name(device)}, cuSPARSELt {version}, torch {torch.__version__}"


@functools.lru_cache(maxsize=4096)
def _shape(dtype: torch.dtype, sizes: tuple[int, ...], turned: bool) -> str:
    """Name of a product's shape in the file of algorithms."""
    rounded = " x ".join(str(algorithms.bucket(n)) for n in sizes)
    return f"{str(dtype).removeprefix('torch.')} {rounded}{' transposed' if turned else ''}"


def multiply(p: Packed, b: Tensor, b_scale: Tensor | None) -> Product | None:
    """p (M, K) @ b.T with b (N, K), in b's dtype or, for e4m3, in bfloat16 without the scales, which it cannot apply.

    None if no algorithm of the library computes it right.
    """
    if not (b.is_contiguous() or (b.T.is_contiguous() and b_scale is None)):  # e4m3 is taken along K alone
        b = b.contiguous()
    sparse, m = blob(p), len(p.values)
    kind: dict[str, Any] = {} if b_scale is None else {"out_dtype": torch.bfloat16}

    def run(algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(sparse, b.T, alg_id=algorithm, **kind)

    from sidlm.ops.sparse24.triton_relayout import restored

    @functools.cache
    def expected() -> tuple[Tensor, Tensor]:
        rows = torch.linspace(0, m - 1, min(m, ROWS_CHECKED), device=b.device).long()
        plain = restored(p.metadata, LAYOUTS[b.itemsize], m)
        return rows, dense_values(p._replace(metadata=plain), rows).float() @ b.float().T

    def right(product: Tensor) -> bool:
        rows, want = expected()
        return difference(product[rows], want) < TOLERANCE

    shape = _shape(b.dtype, (m, b.shape[1], len(b)), not b.is_contiguous())
    algorithm = algorithms.best(_machine(b.device), shape, run, right)
    if algorithm is None:
        return None
    try:
        product = run(algorithm)
    except RuntimeError:  # found for another size of the same bucket
        product = run(0)
    return Product(product, p.scale, b_scale)

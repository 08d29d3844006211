"""Products whose first operand is 2:4 sparse, by what this machine has for them, and which of it is taken.

A backend reads the metadata in a layout of its own, which the packing kernels write. Each is tried on a small product
before it is used: one that computes wrong numbers is refused, and `sid doctor` says so.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sidlm.ops import dispatch
from sidlm.ops.sparse24 import crossover, cusparselt, hopper_product
from sidlm.ops.sparse24.packed import Packed, pack, unpack
from sidlm.ops.sparse24.products import Product, dense_product, dense_values, difference, reads_metadata
from sidlm.ops.sparse24.quantize import FP8, quantize_rows
from sidlm.ops.sparse24.select import select_2to4


class Backend(NamedTuple):
    layouts: dict[int, str]
    """Bytes of a value -> layout of the metadata"""
    multiples: tuple[int, int, int]
    """Of M, K and N"""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """(device, dtype of the values) -> why it cannot be used here, whatever the sizes, or None"""
    multiply: Callable[[Packed, Tensor, Tensor | None], Product | None]
    """(p (M, K) in its layout, b (N, K) with any strides, b's scale (N,) or None) -> p @ b.T, in b's dtype, or for e4m3
    in bfloat16; None if it turns out that it cannot"""


def _why_not_torchao(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != FP8:
        return f"takes float8_e4m3fn, not {dtype}"
    if reason := reads_metadata(device):
        return reason
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    try:
        import torchao.ops  # noqa: F401  # pyright: ignore

        _ = torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8.default
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"torchao without its kernels for {torch.__version__}: {type(error).__name__}"
    return None


def _torchao(p: Packed, b: Tensor, b_scale: Tensor | None) -> Product:
    """CUTLASS. To the library the sparse operand is a weight, and the result is its transpose."""
    assert b_scale is not None and p.scale is not None
    multiply = torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8
    metadata = p.metadata.view(len(p.values), -1)
    return Product(multiply(b.contiguous(), b_scale, p.values, metadata, p.scale, None, torch.bfloat16).T)


def _why_not_dense(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in cusparselt.DTYPES else f"takes bfloat16, float16 and float8_e4m3fn, not {dtype}"


def _dense(p: Packed, b: Tensor, b_scale: Tensor | None) -> Product:
    """The same function by a dense product, which is faster for few tokens, and on any device."""
    return Product(dense_product(dense_values(p), p.scale, b, b_scale))


BACKENDS = {
    "hopper": Backend({1: "plain", 2: "plain"}, (1, 128, 8), hopper_product.why_not, hopper_product.multiply),
    "cusparselt": Backend(cusparselt.LAYOUTS, (64, 64, 16), cusparselt.why_not, cusparselt.multiply),
    "torchao": Backend({1: "cutlass_8bit"}, (64, 128, 16), _why_not_torchao, _torchao),
    "dense": Backend({1: "plain", 2: "plain"}, (1, 1, 1), _why_not_dense, _dense),
}
PREFERENCE = {1: ("hopper", "cusparselt", "torchao", "dense"), 2: ("cusparselt", "hopper", "dense")}
"""Bytes of a value -> backends, the fastest first. On an H200 (T 16384, F 21504, d 4096) products take, in this order,
1.44, 1.40, 1.78 and 1.99 ms in e4m3, but the first alone needs no other order of the metadata and no pass for the
scales, which take 0.1 ms; in bfloat16 2.63, 2.79 and 3.92 ms."""


@functools.cache
def failure(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend that should run does not compute the right product of a small example, or None."""
    fp8 = dtype == FP8
    kind = torch.bfloat16 if fp8 else dtype
    try:
        expected = example("reference", device, fp8, torch.float32)
        wrong = max(difference(example(name, device, fp8, kind, turned), expected) for turned in (False, True))
    except Exception as error:  # whatever a library raises, it is not to be used
        first = next(iter(str(error).splitlines()), "")
        return f"failed on a small product: {type(error).__name__}: {first[:120]}"
    return None if wrong < cusparselt.TOLERANCE else f"computed a small product wrong, by {wrong:.1e} of a row"


def example(name: str, device: torch.device, fp8: bool, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """A product (256, 192), K = 512, by the backend of that name in dtype, or by "reference" on the dense matrix.

    With fp8 the values are e4m3, and dtype is that of the reference; else all are numbers that bfloat16 has. Every
    pattern of a group occurs, and every factor is another. turned: whether b lies transposed.
    """
    make = torch.Generator().manual_seed(0)
    x, b = (torch.randn(n, 512, generator=make).bfloat16().float().to(device) for n in (256, 192))
    plain = pack(x, select_2to4(x, by="magnitude"))
    scale = torch.exp2(torch.arange(256, device=device) % 7 - 3.0) if fp8 else None
    b, b_scale = quantize_rows(b) if fp8 else (b, None)
    plain = Packed(plain.values.to(FP8 if fp8 else dtype), plain.metadata, scale)
    if name == "reference":
        product = unpack(plain._replace(values=plain.values.float())).to(dtype) @ b.to(dtype).T
        return product if b_scale is None else product * b_scale.to(dtype)
    backend, b = BACKENDS[name], b if fp8 else b.to(dtype)
    metadata, layout = plain.metadata, backend.layouts[plain.values.itemsize]
    if layout != "plain":
        from sidlm.ops.sparse24.triton_relayout import relayout

        metadata = torch.empty_like(plain.metadata)
        relayout(plain.metadata, metadata, layout)
    product = backend.multiply(plain._replace(metadata=metadata), b.T.contiguous().T if turned else b, b_scale)
    if product is None:
        raise RuntimeError("no algorithm computes it right")
    values = product.values if product.rows is None else product.values * product.rows[:, None]
    return values if product.columns is None else values * product.columns


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot multiply values of this dtype here, whatever the sizes, or None if it can."""
    return BACKENDS[name].why_not(device, dtype) or failure(name, device, dtype)


def _implementations(dtype: torch.dtype | None) -> dict[str, dispatch.Implementation]:
    """For `dispatch`; dtype: of the values, None for the one of 16 bits that is asked about."""
    return {
        name: dispatch.Implementation(
            BACKENDS[name].multiply, lambda device, other, n=name: why_not(n, device, dtype or other)
        )
        for name in PREFERENCE[2 if dtype is None else dtype.itemsize]
    }


OPS = {"sparse24_product": _implementations(None), "sparse24_product_fp8": _implementations(FP8)}
"""Names for SID_IMPL and `sid doctor`."""


def choose(device: torch.device, dtype: torch.dtype, tokens: int, features: int) -> str:
    """The backend for activations (tokens, features) with values of dtype, packed by rows or transposed.

    The one that SID_IMPL names ("sparse24_product", "sparse24_product_fp8"), or the first that can. "dense" where the
    sizes are not multiples of what it takes, and where there are too few tokens for it to pay, unless it was named.
    """
    return _choose(device, dtype, tokens, features, os.environ.get("SID_IMPL", ""))


@functools.lru_cache(maxsize=4096)  # it is asked for every product, and the host is the slower one for few tokens
def _choose(device: torch.device, dtype: torch.dtype, tokens: int, features: int, asked: str) -> str:
    op = "sparse24_product_fp8" if dtype == FP8 else "sparse24_product"
    name = dispatch.choose(op, OPS[op], None, device, dtype)
    multiple = max(BACKENDS[name].multiples[:2])
    if name == "dense" or tokens % multiple or features % multiple:
        return "dense"
    named = f"{op}={name}" in asked.replace(" ", "").split(",")
    enough = crossover.nearest(torch.cuda.get_device_name(device), dtype == FP8, features)
    return name if named or tokens >= enough.tokens else "dense"

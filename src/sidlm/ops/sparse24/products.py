"""Matrix products of dense and of unpacked operands, and what the sparse backends are checked with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sidlm.ops.sparse24.packed import Packed, unpack


class Product(NamedTuple):
    """A product (M, N), but for factors of its rows and columns, float32, that are not applied yet; None for ones."""

    values: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None


def reads_metadata(device: torch.device) -> str | None:
    """Why the order in which the device's tensor cores want metadata is not known, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None if (major, minor) == (9, 0) else f"metadata is known in the order of sm_90, but this is sm_{major}{minor}"
    )


def dense_product(a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None) -> Tensor:
    """a (M, K) @ b.T with b (N, K): in their dtype (M, N); e4m3 times the scales (M,) and (N,), in bfloat16.

    Both may have any strides; e4m3 that is not contiguous is copied. Sums are in float32; those of e4m3 with tensor
    cores' "fast accumulation", as those of cuSPARSELt: 3 to 13% faster on an H200, and at K = 21504 it adds 1.1e-3
    (relative L2) to bfloat16's own 1.7e-3, beside the 2e-2 that rounding the operands to e4m3 makes.
    """
    if a_scale is None or b_scale is None:
        if a.device.type == "cpu" and a.dtype.itemsize == 2:  # where sums may be in half precision
            return (a.float() @ b.float().T).to(a.dtype)
        return a @ b.T
    if not (len(a) and _multiplies_fp8(a.device)):
        return (a.float() @ b.float().T).mul_(a_scale[:, None]).mul_(b_scale).bfloat16()
    columns, rows = -a.shape[1] % 16, -len(b) % 16
    if columns or rows:
        a, b, b_scale = _padded(a, columns), _padded(b, columns, rows), F.pad(b_scale, (0, rows))
    scales = a_scale[:, None], b_scale[None]
    product = torch._scaled_mm(a.contiguous(), b.contiguous().T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    return product[:, :-rows] if rows else product


def _padded(x: Tensor, columns: int, rows: int = 0) -> Tensor:
    """e4m3 x with zeros behind its columns and rows."""
    return F.pad(x.contiguous().view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def dense_values(p: Packed, rows: Tensor | None = None) -> Tensor:
    """The dense matrix (M, K) of p's values, not scaled, in their dtype; rows int64 (m,): only those, (m, K)."""
    if p.values.device.type == "cuda":
        from sidlm.ops.sparse24.triton_unpack import unpack_rows

        return unpack_rows(p.values, p.metadata, rows)
    bits = p.values.view(torch.uint8 if p.values.itemsize == 1 else torch.int16)
    dense = unpack(Packed(bits, p.metadata)).view(p.values.dtype)
    return dense if rows is None else dense[rows]


def difference(product: Tensor, expected: Tensor) -> float:
    """Largest relative L2 error of any row; of rows that are nearly zero, relative to the others. NaN counts as 1."""
    error, size = (product.float() - expected).norm(dim=1), expected.norm(dim=1)
    return float((error / (size.mean() / 100 + 1e-30).maximum(size)).nan_to_num(1.0).max())

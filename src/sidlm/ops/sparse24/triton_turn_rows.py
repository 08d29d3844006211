"""A dense matrix transposed to e4m3 in words: of a column, bytes of four rows are one before shared memory turns them.

So a quarter as many elements change threads as in `triton_transpose.transpose_rows_kernel`, which takes every length.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24.triton_groups import power_of_two


@triton.jit
@no_type_check
def turn_rows_kernel(
    x_ptr, perm_ptr, bits_ptr, words_ptr, out_scale_ptr, T, D, WORDS,
    BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x (T, D), its rows in the order of perm -> int32 (D, WORDS) of e4m3."""
    tiles = tl.cdiv(D, BD)
    first_word = tl.program_id(0) // tiles * BW
    d, w = tl.program_id(0) % tiles * BD + tl.arange(0, BD), first_word + tl.arange(0, BW)
    scale, inverse = power_of_two(tl.load(bits_ptr + d, mask=d < D, other=0))
    tl.store(out_scale_ptr + d, scale, mask=(d < D) & (first_word == 0))
    out = tl.zeros([BW, BD], tl.int32)
    for i in tl.static_range(4):
        t = 4 * w + i
        row = tl.load(perm_ptr + t, mask=t < T, other=0)[:, None]
        x = tl.load(x_ptr + row * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        byte = (x * inverse[None, :]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # [BW, BD]
        out = out | (byte.to(tl.int32) << 8 * i)
    at = words_ptr + d[:, None].to(tl.int64) * WORDS + w[None, :]
    tl.store(at, tl.trans(out), mask=(d < D)[:, None] & (w < WORDS)[None, :])


def plan(x: Tensor, perm: Tensor, bits: Tensor, out: Tensor, scale: Tensor) -> Launch:
    """The launch that fills out (d, T'), T' a multiple of 4, and its scale; meta tensors will do to compile it."""
    d, length = out.shape
    BW, BD = 32, 64  # 128 bytes of a row read, and written
    args = {
        "x_ptr": x, "perm_ptr": perm, "bits_ptr": bits, "words_ptr": out.view(torch.int32),
        "out_scale_ptr": scale, "T": len(perm), "D": d, "WORDS": length // 4,
    }  # fmt: skip
    return Launch(turn_rows_kernel, -(-d // BD) * -(-length // (4 * BW)), args, {"BW": BW, "BD": BD}, 4)

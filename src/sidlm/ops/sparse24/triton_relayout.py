"""Metadata from the plain order into the one that a backend reads, and back.

The orders of sm_90's tensor cores permute bytes or nibbles among 64 rows and 32 or 64 columns; what lies in a 32-bit
word of the plain order goes to a few neighbouring words. cuSPARSELt documents neither of its own: they were recovered
on an H200 from what `torch._cslt_compress` (cuSPARSELt 0.8.0) makes of matrices that differ in known groups.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch

WORDS = 32
"""Of a row, that a program of the kernels has"""


@triton.jit
@no_type_check
def _nibbles(x, y, i: tl.constexpr, j: tl.constexpr):
    """A 16-bit number of nibble i of x, nibble i of y, nibble j of x and nibble j of y."""
    low = (x >> 4 * i & 15) | (y >> 4 * i & 15) << 4
    return low | (x >> 4 * j & 15) << 8 | (y >> 4 * j & 15) << 12


@triton.jit
@no_type_check
def _bytes(x, y, u, v, i: tl.constexpr):
    """A word of the bytes i of four."""
    return (x >> 8 * i & 255) | (y >> 8 * i & 255) << 8 | (u >> 8 * i & 255) << 16 | (v >> 8 * i & 255) << 24


@triton.jit
@no_type_check
def _places(plain_ptr, tiled_ptr, rows, width, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """Pointers and masks of WORDS words of 64 rows: of rows r < 8 of every 16 and of rows r + 8 [32, WORDS], and of the
    tiles of SIZE words that they go to [WORDS * 64 / SIZE, SIZE]."""
    block, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * WORDS
    pair, word = tl.arange(0, 32)[:, None], first + tl.arange(0, WORDS)[None, :]
    row = block * 64 + pair // 8 * 16 + pair % 8
    upper, lower = plain_ptr + row * width + word, plain_ptr + (row + 8) * width + word
    inside = word < width
    tile = first * 64 // SIZE + tl.arange(0, WORDS * 64 // SIZE)[:, None]
    tiled = tiled_ptr + block * 64 * width + tile * SIZE + tl.arange(0, SIZE)[None, :]
    return upper, lower, inside & (row < rows), inside & (row + 8 < rows), tiled, tile * SIZE < 64 * width


@triton.jit
@no_type_check
def _cusparselt_16bit(plain_ptr, tiled_ptr, rows, width, BACK: tl.constexpr, WORDS: tl.constexpr):
    """A word is 32 columns of a row, eight groups.

    Every 64 rows, in them every 32 columns are 64 words: two for each pair of rows (r, r + 8), whose bytes are the
    groups 0 4 1 5 2 6 3 7, each with the nibble of row r and above it that of row r + 8.
    """
    upper, lower, one, two, tiled, inside = _places(plain_ptr, tiled_ptr, rows, width, 64, WORDS)
    if BACK:
        ab = tl.permute(tl.reshape(tl.load(tiled, mask=inside, other=0), [WORDS, 32, 2]), 1, 0, 2)
        a, b = tl.split(ab)  # [32, WORDS]
        for high in tl.static_range(2):
            # bytes 0 2 of a and b are the groups 0 1 2 3, bytes 1 3 the groups 4 5 6 7
            x = tl.zeros_like(a)
            for i in tl.static_range(4):
                even = a >> 16 * i if i < 2 else b >> 16 * (i - 2)
                x |= (even >> 4 * high & 15) << 4 * i | (even >> 8 + 4 * high & 15) << 4 * (i + 4)
            tl.store(lower if high else upper, x, mask=two if high else one)
    else:
        # rows behind the last: any two of four, of values that are zero
        x, y = tl.load(upper, mask=one, other=0x44444444), tl.load(lower, mask=two, other=0x44444444)
        a = _nibbles(x, y, 0, 4) | _nibbles(x, y, 1, 5) << 16
        b = _nibbles(x, y, 2, 6) | _nibbles(x, y, 3, 7) << 16
        tl.store(tiled, tl.reshape(tl.permute(tl.join(a, b), 1, 0, 2), [WORDS, 64]), mask=inside)


@triton.jit
@no_type_check
def _cusparselt_8bit(plain_ptr, tiled_ptr, rows, width, BACK: tl.constexpr, WORDS: tl.constexpr):
    """Two words are 64 columns of a row, bytes 0 .. 7.

    Every 64 rows, in them every 64 columns are 128 words: four for each pair of rows (r, r + 8), of which word i has
    the bytes i of row r, i of row r + 8, i + 4 of row r, i + 4 of row r + 8.
    """
    upper, lower, one, two, tiled, inside = _places(plain_ptr, tiled_ptr, rows, width, 128, WORDS)
    if BACK:
        words = tl.reshape(tl.load(tiled, mask=inside, other=0), [WORDS // 2, 32, 2, 2])
        ac, bd = tl.split(tl.permute(words, 1, 0, 2, 3))  # words 0 2 and words 1 3: [32, WORDS / 2, 2]
        a, c = tl.split(ac)
        b, d = tl.split(bd)
        for high in tl.static_range(2):
            x = tl.join(_bytes(a, b, c, d, high), _bytes(a, b, c, d, high + 2))
            tl.store(lower if high else upper, tl.reshape(x, [32, WORDS]), mask=two if high else one)
    else:
        x, y = tl.load(upper, mask=one, other=0x44444444), tl.load(lower, mask=two, other=0x44444444)
        x0, x1 = tl.split(tl.reshape(x, [32, WORDS // 2, 2]))
        y0, y1 = tl.split(tl.reshape(y, [32, WORDS // 2, 2]))
        ac = tl.join(_bytes(x0, y0, x1, y1, 0), _bytes(x0, y0, x1, y1, 2))
        bd = tl.join(_bytes(x0, y0, x1, y1, 1), _bytes(x0, y0, x1, y1, 3))
        words = tl.permute(tl.join(ac, bd), 1, 0, 2, 3)  # [WORDS / 2, 32, 2, 2]
        tl.store(tiled, tl.reshape(words, [WORDS // 2, 128]), mask=inside)


KERNELS = {"cusparselt_16bit": _cusparselt_16bit, "cusparselt_8bit": _cusparselt_8bit}
LAYOUTS = ("plain", "cutlass_8bit", *KERNELS)


def plan(plain: Tensor, tiled: Tensor, layout: str, back: bool) -> Launch:
    """The launch for plain (T, K / 8) and tiled (M, K / 8), of which the one is read and the other written."""
    width = plain.shape[1] // 4
    args = {
        "plain_ptr": plain.view(torch.int32), "tiled_ptr": tiled.view(torch.int32), "rows": len(plain), "width": width
    }  # fmt: skip
    grid = len(tiled) // 64, -(-width // WORDS)
    return Launch(KERNELS[layout], grid, args, {"BACK": back, "WORDS": WORDS}, num_warps=4)


def relayout(plain: Tensor, tiled: Tensor, layout: str) -> None:
    """Write plain metadata (T, K / 8) into tiled (M, K / 8), M >= T, in the order of that name.

    M is a multiple of 64 and K too (128 for "cutlass_8bit"), but for "plain". Rows behind T are of some valid pattern.
    """
    if layout in KERNELS:
        plan(plain, tiled, layout, False).run()
        return
    to = _plainly(tiled, layout)
    to[: len(plain)].copy_(plain.view(len(plain), *to.shape[1:]))
    to[len(plain) :].fill_(0x44)


def restored(tiled: Tensor, layout: str, rows: int) -> Tensor:
    """The plain metadata (rows, K / 8) of what `relayout` wrote: the same memory if it is plain."""
    if layout in KERNELS:
        plain = torch.empty(rows, tiled.shape[1], dtype=torch.uint8, device=tiled.device)
        plan(plain, tiled, layout, True).run()
        return plain
    return _plainly(tiled, layout)[:rows].reshape(rows, -1)


def _plainly(tiled: Tensor, layout: str) -> Tensor:
    """View with the rows first. CUTLASS has blocks of 128 columns one after another, in each all rows' 16 bytes."""
    return tiled if layout == "plain" else tiled.view(-1, len(tiled), 16).transpose(0, 1)

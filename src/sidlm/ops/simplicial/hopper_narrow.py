"""What the backward kernels for narrow groups (few query heads a key head) share: tiles of virtual queries.

A tile is 64 rows: two pairs (query, head of the group), each with 32 places for the second keys that its query sees.
The place of a second key is its row modulo 32, not its distance from the query: from one query to the next only one
place changes hands, so sums over queries can stay where they are. In the 16 rows of a warp the first eight belong to
the first pair and the others to the second, at the same places: in a fragment of wgmma a thread has one place of both.
"""

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sidlm.ops.simplicial.hopper_tiles import virtual_cross, virtual_queries
from sidlm.ops.simplicial.prepare import Problem

PLACES = 32
HEADS = 15  # at most: sums over pairs of keys, which meet 32 queries of as many heads, outweigh their products below


def takes(p: Problem) -> bool:
    """Whether groups are narrow enough and the second window fits; hopper.takes says the rest."""
    return p.w2 <= PLACES and p.shape[5] <= HEADS


@gluon.jit
@no_type_check
def of_rows(row):
    """Pair (0 or 1) and place of the rows of a tile."""
    return (row >> 3) & 1, (row & 7) | ((row >> 4) << 3)


@gluon.jit
@no_type_check
def seen_second(query, last, reach_ptr, b, T, w2, HAS_DOCS: gl.constexpr):
    """How many second keys a query sees, up to row `last`."""
    seen = gl.minimum(last + 1, w2)
    if HAS_DOCS:
        seen = gl.minimum(seen, gl.load(reach_ptr + b * T + query))
    return seen


@gluon.jit
@no_type_check
def virtual_rows(
    x_ptr, xb_ptr, y_ptr, yb_ptr, first, end, b, group, T, S2, w2, bias, reach_ptr,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, CROSS: gl.constexpr, BIAS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """x o (y + bias), or y cross x from permuted copies, of the pairs from `first` on, which end before `end`: [64, D].

    x (B, T, H, D) is q or the gradient of the output, y (B, S2, G, D) k2 or v2. Zero where the query does not see y.
    """
    layout: gl.constexpr = gl.BlockedLayout([2, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    pairs = gl.minimum(first + gl.arange(0, 2, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout))), end - 1)
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    place = gl.expand_dims(gl.expand_dims(place, 0), 2)
    d = gl.expand_dims(gl.expand_dims(d, 0), 1)
    query = gl.expand_dims(gl.expand_dims(pairs // R, 1), 2)
    if R % 2 == 0:  # both are of one query
        query = gl.minimum(first, end - 1) // R
    last = query + S2 - T
    age = (last - place) & 31
    seen = seen_second(query, last, reach_ptr, b, T, w2, HAS_DOCS)
    at = ((b * T + pairs // R).to(gl.int64) * (R * G) + group * R + pairs % R) * D
    at = gl.expand_dims(gl.expand_dims(at, 1), 2) + d
    at_y = ((b * S2).to(gl.int64) * G + group) * D + ((last - age) * (G * D) + d)
    x = gl.load(x_ptr + at, mask=seen > 0, other=0.0)  # padding sees nothing, and may be NaN
    y = gl.load(y_ptr + at_y, mask=age < seen, other=0.0)
    if CROSS:
        xb = gl.load(xb_ptr + at, mask=seen > 0, other=0.0)
        yb = gl.load(yb_ptr + at_y, mask=age < seen, other=0.0)
        rows = virtual_cross(x, xb, y, yb)
    else:
        rows = virtual_queries(x, y, bias, BIAS)
    return gl.reshape(gl.permute(gl.reshape(rows, [2, 4, 8, D]), (1, 0, 2, 3)), [64, D])


@gluon.jit
@no_type_check
def statistics(
    row, first, end, lse_ptr, delta_ptr, b, group, T, S2, w2, reach_ptr,
    R: gl.constexpr, G: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """LSE of the rows of a tile, in powers of two, infinite for what is out of sight, and delta."""
    LOG2E: gl.constexpr = 1.4426950408889634
    which, place = of_rows(row)
    pairs = gl.minimum(first + which, end - 1)
    query = pairs // R
    last = query + S2 - T
    at = (b * T + query).to(gl.int64) * (R * G) + group * R + pairs % R
    lse = gl.load(lse_ptr + at)
    seen = ((last - place) & 31) < seen_second(query, last, reach_ptr, b, T, w2, HAS_DOCS)
    seen = seen & (first + which < end) & (lse > -float("inf"))
    return gl.where(seen, lse * LOG2E, float("inf")), gl.where(seen, gl.load(delta_ptr + at), 0.0)

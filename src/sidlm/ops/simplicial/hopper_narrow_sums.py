"""What hopper_narrow_queries.py does at the end of a tile: dq to memory, shares of dk2 and dv2 onto sums that stay.

The sums of the 32 second keys in sight are a ring in shared memory: a second key's place is its row modulo 32.
"""

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sidlm.ops.simplicial.hopper_narrow import seen_second


@gluon.jit
@no_type_check
def _pairs_of(x, layout: gl.constexpr, D: gl.constexpr):
    """The rows of the two pairs, [32, D] each, of a tile [64, D]."""
    one, two = gl.split(gl.permute(gl.reshape(x, [4, 2, 8, D]), (0, 2, 3, 1)))
    one = gl.convert_layout(gl.reshape(one, [32, D]), layout)
    return one, gl.convert_layout(gl.reshape(two, [32, D]), layout)


@gluon.jit
@no_type_check
def leave(sums, out_ptr, m, which, bound, away, D: gl.constexpr, layout: gl.constexpr):
    """Sums of second keys m [32] to memory; those before `bound`, of the queries before too, have another slot."""
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = m.to(gl.int64) * D + gl.where(m < bound, away, 0)
    gl.store(out_ptr + (at[:, None] + d[None, :]), sums, mask=(which & (m >= 0))[:, None])


@gluon.jit
@no_type_check
def _change(sums, out_ptr, old_last, last, bound, away, D: gl.constexpr, layout: gl.constexpr):
    """The sums when the next query sees second keys up to `last`: zero in the places that change hands."""
    place = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    m = old_last - ((old_last - place) & 31)
    changed = m != last - ((last - place) & 31)
    if last != old_last:
        leave(sums, out_ptr, m, changed, bound, away, D, layout)
    return gl.where(changed[:, None], 0.0, sums)


@gluon.jit
@no_type_check
def _collect(
    ring, one, two, seen_one, seen_two, x_one_ptr, x_two_ptr, out_ptr, old_last, last_one, last_two, bound, away,
    D: gl.constexpr, SAME: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What the two pairs of a tile give to the second keys, [32, D] o their row of x each, onto the sums."""
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    x = gl.load(x_one_ptr + d).to(gl.float32)
    one = gl.where(seen_one, one * x[None, :], 0.0)  # what is out of sight may have met NaN
    x = gl.load(x_two_ptr + d).to(gl.float32)
    two = gl.where(seen_two, two * x[None, :], 0.0)
    sums = _change(ring.load(layout), out_ptr, old_last, last_one, bound, away, D, layout) + one
    if not SAME:
        sums = _change(sums, out_ptr, last_one, last_two, bound, away, D, layout)
    ring.store(sums + two)


@gluon.jit
@no_type_check
def _sum_places(x, scratch, out_ptr, inside, scale, D: gl.constexpr):
    """out[:] = scale * sum over places of x [32, D], a column a thread."""
    column: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, 4], [0, 1])
    scratch.store(x)
    total = gl.sum(scratch.load(column), 0)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, column))
    gl.store(out_ptr + d, (total * scale).to(out_ptr.dtype.element_ty), mask=inside & (d < D))


@gluon.jit
@no_type_check
def merge(
    du, z, ring_smem, scratch, pair, end, old_last, q_ptr, qb_ptr, k2_ptr, k2b_ptr, do_ptr, dq_ptr, dqb_ptr,
    dk2_ptr, dk2b_ptr, dv2_ptr, reach_ptr, b, group, T, S2, w2, scale, k2_bias, bound, away,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, DETERMINANT: gl.constexpr, HAS_DOCS: gl.constexpr,
    WG: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The end of a tile: dq to memory, shares of dk2 and dv2 onto their sums. Returns the last second key in sight."""
    SAME: gl.constexpr = R % 2 == 0  # both pairs are of one query
    COPIES: gl.constexpr = 2 if DETERMINANT else 1
    SUMS: gl.constexpr = 1 + COPIES
    place = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    start = ((b * S2).to(gl.int64) * G + group) * D
    one = gl.minimum(pair, end - 1)
    two = gl.minimum(pair + 1, end - 1)
    last_one = one // R + S2 - T
    last_two = two // R + S2 - T
    row_one = ((b * T + one // R).to(gl.int64) * (R * G) + group * R + one % R) * D
    row_two = ((b * T + two // R).to(gl.int64) * (R * G) + group * R + two % R) * D
    age = (last_one - place) & 31
    at_one = start + (last_one - age)[:, None] * (G * D) + d[None, :]
    seen_one = (age < seen_second(one // R, last_one, reach_ptr, b, T, w2, HAS_DOCS))[:, None]
    at_two = at_one
    seen_two = seen_one
    if not SAME:
        age = (last_two - place) & 31
        at_two = start + (last_two - age)[:, None] * (G * D) + d[None, :]
        seen_two = (age < seen_second(two // R, last_two, reach_ptr, b, T, w2, HAS_DOCS))[:, None]
    seen_two = seen_two & (pair + 1 < end)
    z_one, z_two = _pairs_of(z, layout, D)
    _collect(ring_smem.index(SUMS * WG), z_one, z_two, seen_one, seen_two, do_ptr + row_one, do_ptr + row_two,
             dv2_ptr, old_last, last_one, last_two, bound, away, D, SAME, layout)  # fmt: skip
    du_one, du_two = _pairs_of(du, layout, D)
    for copy in gl.static_range(COPIES):
        second_ptr = k2_ptr if copy == 0 else k2b_ptr
        out_ptr = dq_ptr if copy == 0 else dqb_ptr
        k2 = gl.load(second_ptr + at_one, mask=seen_one, other=0.0).to(gl.float32) + k2_bias
        _sum_places(gl.where(seen_one, du_one * k2, 0.0), scratch.index(2 * WG), out_ptr + row_one,
                    pair < end, scale, D)  # fmt: skip
        if not SAME:
            k2 = gl.load(second_ptr + at_two, mask=seen_two, other=0.0).to(gl.float32) + k2_bias
        _sum_places(gl.where(seen_two, du_two * k2, 0.0), scratch.index(2 * WG + 1), out_ptr + row_two,
                    pair + 1 < end, scale, D)  # fmt: skip
    for copy in gl.static_range(COPIES):
        first_ptr = q_ptr if copy == 0 else qb_ptr
        out_ptr = dk2_ptr if copy == 0 else dk2b_ptr
        _collect(ring_smem.index(SUMS * WG + 1 + copy), du_one, du_two, seen_one, seen_two,
                 first_ptr + row_one, first_ptr + row_two,
                 out_ptr, old_last, last_one, last_two, bound, away, D, SAME, layout)  # fmt: skip
    return last_two

"""2-simplicial attention, forward, in portable Triton: flash attention over virtual queries (README.md).

A program owns BQ neighbouring queries and BH heads of one group. Its M = BQ * BH * BS tile rows are (query, head,
offset): row s of query i is the virtual query u = q[i] o (k2[i-s] + bias), so the loop over keys is flash attention's.
Only the epilogue knows of v2: it multiplies each row's accumulator by v2[i-s] + bias and merges the BS rows of a head
by their softmax weights. Windows wider than BS take several tiles of offsets, merged the same way.

Key blocks that every row sees whole run without masks; the others, at the two ends of the window, run after them.
"""

from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial import prepare
from sidlm.ops.simplicial.prepare import LOG2E, Launch, Problem


@triton.jit
@no_type_check
def load_rows(
    pointer, rows, stride, keep, d, D: tl.constexpr, MASKED: tl.constexpr, AGAIN: tl.constexpr = False
):  # fmt: skip
    """Rows [N] of a matrix with D columns -> [N, BD]; zero where `keep` [N] is false and past column D.

    AGAIN, after a loop: really load what was loaded before it. An equal load would be merged with the first one, whose
    registers the loop needs; one with another cache policy is not equal.
    """
    pointers = pointer + rows[:, None] * stride + d[None, :]
    if AGAIN:
        return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0, eviction_policy="evict_last")
    if MASKED:
        return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    if d.shape[0] == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
@no_type_check
def product(xa, xb, ya, yb, CROSS: tl.constexpr):
    """x o y, or x cross y from permuted copies (prepare.py)."""
    if CROSS:
        return xa * yb - xb * ya
    return xa * ya


@triton.jit
@no_type_check
def locate(pid, query_tiles, head_tiles, G):
    """Program -> (batch, group, query tile, head tile): neighbours in time read the same keys."""
    head_tile = pid % head_tiles
    query_tile = pid // head_tiles % query_tiles
    bg = pid // head_tiles // query_tiles
    return bg // G, bg % G, query_tile, head_tile


@triton.jit
@no_type_check
def key_range(i_low, i_high, first, w1, before, BN: tl.constexpr):
    """Keys that queries i_low .. i_high of one document can see, in blocks of BN.

    Returns the first key, the end, and the half-open range of the blocks that all the queries see whole.
    """
    low = tl.maximum(tl.maximum(i_low - w1 + 1, first), -before)
    whole_from = tl.maximum(i_high - w1 + 1, low)
    block_from = tl.cdiv(whole_from - low, BN)
    block_to = tl.maximum((i_low + 1 - low) // BN, block_from)
    return low, i_high + 1, block_from, block_to


@triton.jit
@no_type_check
def virtual_queries(
    qa_ptr, qb_ptr, k2a_ptr, k2b_ptr, rows, rows2, stride, stride2, alive, seen, d, sign, bias,
    D: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """u = k2 o q (or k2 cross q) in float32 [M, BD], zero in rows that see nothing."""
    qa = load_rows(qa_ptr, rows, stride, alive, d, D, True).to(tl.float32)
    k2a = load_rows(k2a_ptr, rows2, stride2, seen, d, D, True).to(tl.float32) + bias
    qb, k2b = qa, k2a
    if CROSS:
        qb = load_rows(qb_ptr, rows, stride, alive, d, D, True).to(tl.float32)
        k2b = load_rows(k2b_ptr, rows2, stride2, seen, d, D, True).to(tl.float32) + bias
    return tl.where(seen[:, None], product(k2a, k2b, qa, qb, CROSS) * sign, 0.0)


@triton.jit
@no_type_check
def attend(
    acc, top, total, u, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: acc [M, BD], top [M] (in powers of two) and total [M] of the online softmax."""
    k = load_rows(k_ptr, keys, stride, keys < end, d, D, EDGE)
    logits = tl.dot(u, tl.trans(k), input_precision=PRECISION) * c  # [M, BN]
    if EDGE:
        sees = (keys[None, :] <= i[:, None]) & (keys[None, :] > i[:, None] - w1) & (keys < end)[None, :]
        logits = tl.where(sees, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    level = new_top
    if EDGE:  # a row that has seen nothing yet
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(logits - level[:, None])
    decay = tl.exp2(top - level)
    v = load_rows(v_ptr, keys, stride, keys < end, d, D, EDGE)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total * decay + tl.sum(p, 1)


@triton.jit
@no_type_check
def forward_rows(
    qa_ptr, qb_ptr, k_ptr, v_ptr, k2a_ptr, k2b_ptr, v2_ptr, out_ptr, lse_ptr,
    i_tile, i_low, i_high, first, head_tile, sign, c, k2_bias, v2_bias, before, before2, G, R, w1, w2,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    CROSS: tl.constexpr, ONE_TILE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries i_low .. i_high (one document) of the tile that starts at query i_tile.

    Pointers are at position 0 of the sequence and the first head of the group.
    """
    M: tl.constexpr = BQ * BH * BS
    row = tl.arange(0, M)
    d = tl.arange(0, BD)
    h = head_tile * BH + row // BS % BH
    i = i_tile + row // (BS * BH)
    alive = (h < R) & (i >= i_low) & (i <= i_high)
    one = tl.full([], 1, tl.int64 if WIDE else tl.int32)
    heads, stride = G * R * one, G * D * one
    low, end, block_from, block_to = key_range(i_low, i_high, first, w1, before, BN)
    blocks = tl.cdiv(end - low, BN)
    # offsets that reach before the first key of the second axis, or of the document, are never seen
    offsets = tl.minimum(w2, i_high - tl.maximum(first, -before2) + 1)

    out = tl.zeros([BQ * BH, BD], tl.float32)
    out_top = tl.full([BQ * BH], float("-inf"), tl.float32)
    out_total = tl.zeros([BQ * BH], tl.float32)
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(offsets, BS)):
        s = tile * BS + row % BS
        seen = alive & (s < offsets) & (i - s >= first) & (i - s >= -before2)
        rows, rows2 = i * heads + h, i - s
        u = virtual_queries(
            qa_ptr, qb_ptr, k2a_ptr, k2b_ptr, rows, rows2, D, stride, alive, seen, d, sign, k2_bias, D, CROSS
        ).to(k_ptr.dtype.element_ty)
        acc = tl.zeros([M, BD], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for block in tl.range(block_from, block_to, num_stages=STAGES):
            keys = low + block * BN + tl.arange(0, BN)
            acc, top, total = attend(
                acc, top, total, u, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D, False, PRECISION
            )
        for edge in tl.range(0, blocks - block_to + block_from, num_stages=STAGES):
            keys = low + tl.where(edge < block_from, edge, edge + block_to - block_from) * BN + tl.arange(0, BN)
            acc, top, total = attend(
                acc, top, total, u, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D, True, PRECISION
            )

        v2 = load_rows(v2_ptr, rows2, stride, seen, d, D, True).to(tl.float32) + v2_bias
        top = tl.reshape(tl.where(seen, top, float("-inf")), [BQ * BH, BS])
        new_top = tl.maximum(out_top, tl.max(top, 1))
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(top - level[:, None])  # [BQ * BH, BS]
        decay = tl.exp2(out_top - level)
        total = tl.reshape(tl.where(seen, total, 0.0), [BQ * BH, BS])
        out_total = out_total * decay + tl.sum(weight * total, 1)
        acc = tl.where(seen[:, None], acc * v2 * tl.reshape(weight, [M])[:, None], 0.0)
        out = out * decay[:, None] + tl.sum(tl.reshape(acc, [BQ * BH, BS, BD]), 1)
        out_top = new_top

    head = tl.arange(0, BQ * BH)
    h = head_tile * BH + head % BH
    i = i_tile + head // BH
    alive = (h < R) & (i >= i_low) & (i <= i_high)
    nothing = out_total == 0.0
    out = out / tl.where(nothing, 1.0, out_total)[:, None]
    lse = (out_top + tl.log2(tl.where(nothing, 1.0, out_total))) * 0.6931471805599453  # -inf where nothing is seen
    rows = i * heads + h
    tl.store(lse_ptr + rows, lse, mask=alive)
    tl.store(out_ptr + rows[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=alive[:, None] & (d < D))


@triton.jit
@no_type_check
def forward_kernel(
    qa_ptr, qb_ptr, k_ptr, v_ptr, k2a_ptr, k2b_ptr, v2_ptr, reach_ptr, out_ptr, lse_ptr,
    sign, c, k2_bias, v2_bias, T, S1, S2, G, R, w1, w2, query_tiles, head_tiles,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    CROSS: tl.constexpr, ONE_TILE: tl.constexpr, HAS_DOCS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """q (B, T, H, D), k and v (B, S1, G, D), k2 and v2 (B, S2, G, D) -> out (B, T, H, D), lse (B, T, H) float32."""
    b, g, query_tile, head_tile = locate(tl.program_id(0), query_tiles, head_tiles, G)
    b = b.to(tl.int64)
    q_at = (b * T * G + g) * R  # rows of a batch entry: T * H
    k_at = ((b * S1 + S1 - T) * G + g) * D  # position 0
    k2_at = ((b * S2 + S2 - T) * G + g) * D
    i_tile = query_tile * BQ
    i_high = tl.minimum(T, i_tile + BQ) - 1
    if HAS_DOCS:
        # a tile of several documents goes through them one by one: a NaN in one would cross to the other as 0 * NaN
        while i_high >= i_tile:
            first = i_high - tl.load(reach_ptr + b * T + i_high) + 1
            i_low = tl.maximum(i_tile, tl.minimum(first, i_high))
            forward_rows(
                qa_ptr + q_at * D, qb_ptr + q_at * D, k_ptr + k_at, v_ptr + k_at, k2a_ptr + k2_at, k2b_ptr + k2_at,
                v2_ptr + k2_at, out_ptr + q_at * D, lse_ptr + q_at, i_tile, i_low, i_high, first, head_tile, sign, c,
                k2_bias, v2_bias, S1 - T, S2 - T, G, R, w1, w2, D, BD, BQ, BH, BS, BN, CROSS, ONE_TILE, WIDE,
                PRECISION, STAGES,
            )  # fmt: skip
            i_high = i_low - 1
    else:
        forward_rows(
            qa_ptr + q_at * D, qb_ptr + q_at * D, k_ptr + k_at, v_ptr + k_at, k2a_ptr + k2_at, k2b_ptr + k2_at,
            v2_ptr + k2_at, out_ptr + q_at * D, lse_ptr + q_at, i_tile, i_tile, i_high, -(1 << 30), head_tile, sign, c,
            k2_bias, v2_bias, S1 - T, S2 - T, G, R, w1, w2, D, BD, BQ, BH, BS, BN, CROSS, ONE_TILE, WIDE, PRECISION,
            STAGES,
        )  # fmt: skip


class Tile(NamedTuple):
    """Rows, keys a block, warps, pipeline stages."""

    m: int
    bn: int
    warps: int
    stages: int


# (architecture, or whether shared memory is large; bytes an element; padded head dimension)
FORWARD_TILES: dict[tuple[str | bool, int, int], Tile] = {
    (True, 2, 64): Tile(64, 64, 4, 3),
    (True, 2, 128): Tile(64, 64, 4, 3),
    (True, 2, 256): Tile(64, 64, 8, 2),
    (True, 4, 64): Tile(64, 32, 4, 3),
    (True, 4, 128): Tile(32, 32, 8, 2),
    (True, 4, 256): Tile(16, 16, 4, 2),
    (False, 2, 64): Tile(64, 64, 4, 2),
    (False, 2, 128): Tile(64, 32, 4, 2),
    (False, 2, 256): Tile(64, 16, 4, 2),
    (False, 4, 64): Tile(64, 32, 4, 2),
    (False, 4, 128): Tile(64, 16, 4, 2),
    (False, 4, 256): Tile(32, 16, 4, 1),
}


def choose_tile(table: dict[tuple[str | bool, int, int], Tile], arch: str, x: Tensor) -> Tile:
    """The launch configuration for a head dimension and element type; small tiles in the interpreter."""
    if arch == "interpreter":
        return Tile(32, 16, 4, 1)
    size, dim = x.element_size(), prepare.next_power(x.shape[-1], 64)
    return table.get((arch, size, dim)) or table[prepare.is_large(arch), size, dim]


@lru_cache(maxsize=256)
def split_rows(m: int, bn: int, steps: int, per_group: int, w1: int, w2: int) -> tuple[int, int, int]:
    """(BQ, BH, BS) with product m: queries, heads and offsets of a tile, for the fewest blocks of keys in all."""

    def blocks(split: tuple[int, int, int]) -> tuple[int, int]:
        bq, bh, bs = split
        tiles = -(-steps // bq) * -(-per_group // bh) * -(-w2 // bs)
        return tiles * -(-(w1 + bq - 1) // bn), bq

    powers = [1 << e for e in range(m.bit_length())]
    return min(((m // bh // bs, bh, bs) for bh in powers for bs in powers if bh * bs <= m), key=blocks)


def row_constants(p: Problem, tile: Tile, arch: str, has_docs: bool) -> dict[str, Any]:
    """Constants of the kernels whose rows are (query, head, offset)."""
    _, steps, _, _, _, per_group, dim = p.shape
    bq, bh, bs = split_rows(tile.m, tile.bn, steps, per_group, p.w1, p.w2)
    return {
        "D": dim, "BD": prepare.next_power(dim, 16), "BQ": bq, "BH": bh, "BS": bs, "BN": tile.bn,
        "CROSS": p.determinant, "ONE_TILE": p.w2 <= bs, "HAS_DOCS": has_docs, "WIDE": p.wide,
        "PRECISION": prepare.precision(arch, p.q), "STAGES": tile.stages,
    }  # fmt: skip


def row_args(p: Problem, scale: float, constants: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Grid and scalar arguments of the kernels whose rows are (query, head, offset)."""
    batch, steps, s1, s2, groups, per_group, _ = p.shape
    query_tiles, head_tiles = -(-steps // constants["BQ"]), -(-per_group // constants["BH"])
    args = {
        # the largest logit is found before scaling, so the factor must not be negative
        "sign": -1.0 if scale < 0 else 1.0, "c": abs(scale) * LOG2E, "k2_bias": p.k2_bias, "v2_bias": p.v2_bias,
        "T": steps, "S1": s1, "S2": s2, "G": groups, "R": per_group, "w1": p.w1, "w2": p.w2,
        "query_tiles": query_tiles, "head_tiles": head_tiles,
    }  # fmt: skip
    return batch * groups * query_tiles * head_tiles, args


def plan(p: Problem, scale: float, doc_ids: Tensor | None, out: Tensor, lse: Tensor, arch: str) -> Launch:
    """The forward launch for a target; the tensors may be on the meta device if it is only to be compiled."""
    tile = choose_tile(FORWARD_TILES, arch, p.q)
    constants = row_constants(p, tile, arch, doc_ids is not None)
    grid, args = row_args(p, scale, constants)
    (qa, qb), (k2a, k2b), reach = p.right(p.q), p.left(p.k2), prepare.reach(doc_ids, p.q.shape[1])
    tensors = {
        "qa_ptr": qa, "qb_ptr": qb, "k_ptr": p.k, "v_ptr": p.v, "k2a_ptr": k2a, "k2b_ptr": k2b, "v2_ptr": p.v2,
        "reach_ptr": lse if reach is None else reach, "out_ptr": out, "lse_ptr": lse,
    }  # fmt: skip
    return Launch(forward_kernel, grid, {**tensors, **args}, constants, tile.warps, tile.stages)


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) in dtype (q's), contiguous, and natural-log LSE (B, T, H), float32."""
    p = prepare.problem(q, k, v, k2, v2, w1, w2, form, k2_bias, v2_bias)
    out = torch.empty_like(p.q, dtype=dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        plan(p, scale, doc_ids, out, lse, prepare.target(q.device)).run()
    return out, lse

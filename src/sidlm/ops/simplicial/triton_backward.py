"""2-simplicial attention, backward, in portable Triton: deterministic, seven matrix products per pair.

`queries_kernel` has the forward's rows (query, head, offset): three products give dU, and the sum over a head's offsets
of dU o k2 gives dq. `triton_backward_keys.py` gives the gradients of the two kinds of keys with four products. Each
program writes memory of its own, so there are no atomics and every sum has a fixed order.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial import prepare
from sidlm.ops.simplicial.prepare import Launch, Problem
from sidlm.ops.simplicial.triton_backward_keys import key_gradients
from sidlm.ops.simplicial.triton_forward import (
    Tile,
    choose_tile,
    key_range,
    load_rows,
    locate,
    row_args,
    row_constants,
    virtual_queries,
)


@triton.jit
@no_type_check
def delta_kernel(grad_ptr, out_ptr, grad_lse_ptr, delta_ptr, N, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """delta = sum_d grad_out * out - grad_lse for rows (B*T*H), float32."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    grad = load_rows(grad_ptr, row, D, row < N, d, D, True).to(tl.float32)
    out = load_rows(out_ptr, row, D, row < N, d, D, True).to(tl.float32)
    grad_lse = tl.load(grad_lse_ptr + row, mask=row < N, other=0.0)
    tl.store(delta_ptr + row, tl.sum(grad * out, 1) - grad_lse, mask=row < N)


@triton.jit
@no_type_check
def grad_of_queries(
    acc, u, grad, lse, delta, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys added to dU [M, BD]. lse [M] is in powers of two, +inf in rows that see nothing."""
    k = load_rows(k_ptr, keys, stride, keys < end, d, D, EDGE)
    logits = tl.dot(u, tl.trans(k), input_precision=PRECISION)
    v = load_rows(v_ptr, keys, stride, keys < end, d, D, EDGE)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(logits * c - lse[:, None])
    if EDGE:
        sees = (keys[None, :] <= i[:, None]) & (keys[None, :] > i[:, None] - w1) & (keys < end)[None, :]
        p = tl.where(sees, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
@no_type_check
def queries_rows(
    qa_ptr, qb_ptr, grad_ptr, k_ptr, v_ptr, k2a_ptr, k2b_ptr, v2_ptr, lse_ptr, delta_ptr, dq_ptr,
    i_tile, i_low, i_high, first, head_tile, sign, c, scale, k2_bias, v2_bias, before, before2, G, R, w1, w2,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    CROSS: tl.constexpr, TURN: tl.constexpr, ONE_TILE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq of queries i_low .. i_high (one document) of the tile that starts at query i_tile.

    Pointers are at position 0 of the sequence and the first head of the group.
    """
    M: tl.constexpr = BQ * BH * BS
    row = tl.arange(0, M)
    d = tl.arange(0, BD)
    h = head_tile * BH + row // BS % BH
    i = i_tile + row // (BS * BH)
    one = tl.full([], 1, tl.int64 if WIDE else tl.int32)
    heads, stride = G * R * one, G * D * one
    rows = i * heads + h
    alive = (h < R) & (i >= i_low) & (i <= i_high)
    low, end, block_from, block_to = key_range(i_low, i_high, first, w1, before, BN)
    blocks = tl.cdiv(end - low, BN)
    offsets = tl.minimum(w2, i_high - tl.maximum(first, -before2) + 1)

    dq = tl.zeros([BQ * BH, BD], tl.float32)
    dq_b = tl.zeros([BQ * BH, BD], tl.float32)
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(offsets, BS)):
        s = tile * BS + row % BS
        seen = alive & (s < offsets) & (i - s >= first) & (i - s >= -before2)
        rows2 = i - s
        u = virtual_queries(
            qa_ptr, qb_ptr, k2a_ptr, k2b_ptr, rows, rows2, D, stride, alive, seen, d, sign, k2_bias, D, CROSS
        ).to(k_ptr.dtype.element_ty)
        grad = load_rows(grad_ptr, rows, D, seen, d, D, True).to(tl.float32)
        grad = grad * (load_rows(v2_ptr, rows2, stride, seen, d, D, True).to(tl.float32) + v2_bias)
        grad = grad.to(v_ptr.dtype.element_ty)
        lse = tl.load(lse_ptr + rows, mask=seen, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + rows, mask=seen, other=0.0)
        acc = tl.zeros([M, BD], tl.float32)
        for block in tl.range(block_from, block_to, num_stages=STAGES):
            keys = low + block * BN + tl.arange(0, BN)
            acc = grad_of_queries(
                acc, u, grad, lse, delta, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D, False, PRECISION
            )
        for edge in tl.range(0, blocks - block_to + block_from, num_stages=STAGES):
            keys = low + tl.where(edge < block_from, edge, edge + block_to - block_from) * BN + tl.arange(0, BN)
            acc = grad_of_queries(
                acc, u, grad, lse, delta, k_ptr, v_ptr, keys, stride, i, w1, end, c, d, D, True, PRECISION
            )

        k2 = load_rows(k2a_ptr, rows2, stride, seen, d, D, True, True).to(tl.float32) + k2_bias
        dq += tl.sum(tl.reshape(tl.where(seen[:, None], acc * k2, 0.0), [BQ * BH, BS, BD]), 1)
        if CROSS:
            k2 = load_rows(k2b_ptr, rows2, stride, seen, d, D, True, True).to(tl.float32) + k2_bias
            dq_b += tl.sum(tl.reshape(tl.where(seen[:, None], acc * k2, 0.0), [BQ * BH, BS, BD]), 1)

    if CROSS:  # dq = dU cross k2 = sum_a[rotation a] - sum_b[rotation b]; plain on the last D mod 3
        whole = (d < D // 3 * 3)[None, :]
        to_a = tl.where(whole, (d // 3 * 3 + (d + TURN) % 3)[None, :], d[None, :])
        to_b = tl.where(whole, (d // 3 * 3 + (d + 3 - TURN) % 3)[None, :], 0)
        dq_b = tl.gather(dq_b, tl.broadcast_to(to_b, [BQ * BH, BD]), 1)
        dq = tl.gather(dq, tl.broadcast_to(to_a, [BQ * BH, BD]), 1) - tl.where(whole, dq_b, 0.0)
    head = tl.arange(0, BQ * BH)
    h = head_tile * BH + head % BH
    i = i_tile + head // BH
    alive = (h < R) & (i >= i_low) & (i <= i_high)
    pointers = dq_ptr + (i * heads + h)[:, None] * D + d[None, :]
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask=alive[:, None] & (d < D)[None, :])


@triton.jit
@no_type_check
def queries_kernel(
    qa_ptr, qb_ptr, grad_ptr, k_ptr, v_ptr, k2a_ptr, k2b_ptr, v2_ptr, reach_ptr, lse_ptr, delta_ptr, dq_ptr,
    sign, c, scale, k2_bias, v2_bias, T, S1, S2, G, R, w1, w2, query_tiles, head_tiles,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    CROSS: tl.constexpr, TURN: tl.constexpr, ONE_TILE: tl.constexpr, HAS_DOCS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, T, H, D) from grad (B, T, H, D), lse and delta (B, T, H) float32 and the forward's inputs."""
    b, g, query_tile, head_tile = locate(tl.program_id(0), query_tiles, head_tiles, G)
    b = b.to(tl.int64)
    q_at = (b * T * G + g) * R  # rows of a batch entry: T * H
    k_at = ((b * S1 + S1 - T) * G + g) * D  # position 0
    k2_at = ((b * S2 + S2 - T) * G + g) * D
    i_tile = query_tile * BQ
    i_high = tl.minimum(T, i_tile + BQ) - 1
    if HAS_DOCS:  # document by document, as in the forward
        while i_high >= i_tile:
            first = i_high - tl.load(reach_ptr + b * T + i_high) + 1
            i_low = tl.maximum(i_tile, tl.minimum(first, i_high))
            queries_rows(
                qa_ptr + q_at * D, qb_ptr + q_at * D, grad_ptr + q_at * D, k_ptr + k_at, v_ptr + k_at, k2a_ptr + k2_at,
                k2b_ptr + k2_at, v2_ptr + k2_at, lse_ptr + q_at, delta_ptr + q_at, dq_ptr + q_at * D, i_tile, i_low,
                i_high, first, head_tile, sign, c, scale, k2_bias, v2_bias, S1 - T, S2 - T, G, R, w1, w2,
                D, BD, BQ, BH, BS, BN, CROSS, TURN, ONE_TILE, WIDE, PRECISION, STAGES,
            )  # fmt: skip
            i_high = i_low - 1
    else:
        queries_rows(
            qa_ptr + q_at * D, qb_ptr + q_at * D, grad_ptr + q_at * D, k_ptr + k_at, v_ptr + k_at, k2a_ptr + k2_at,
            k2b_ptr + k2_at, v2_ptr + k2_at, lse_ptr + q_at, delta_ptr + q_at, dq_ptr + q_at * D, i_tile, i_tile,
            i_high, -(1 << 30), head_tile, sign, c, scale, k2_bias, v2_bias, S1 - T, S2 - T, G, R, w1, w2,
            D, BD, BQ, BH, BS, BN, CROSS, TURN, ONE_TILE, WIDE, PRECISION, STAGES,
        )  # fmt: skip


# (architecture, or whether shared memory is large; bytes an element; padded head dimension)
QUERY_TILES: dict[tuple[str | bool, int, int], Tile] = {
    (True, 2, 64): Tile(64, 64, 4, 3),
    (True, 2, 128): Tile(64, 64, 4, 2),
    (True, 2, 256): Tile(64, 32, 8, 2),
    (True, 4, 64): Tile(32, 32, 8, 2),
    (True, 4, 128): Tile(32, 32, 8, 1),
    (True, 4, 256): Tile(16, 16, 8, 1),
    (False, 2, 64): Tile(64, 32, 4, 2),
    (False, 2, 128): Tile(64, 32, 4, 1),
    (False, 2, 256): Tile(32, 16, 4, 1),
    (False, 4, 64): Tile(32, 32, 4, 1),
    (False, 4, 128): Tile(32, 16, 4, 1),
    (False, 4, 256): Tile(16, 16, 4, 1),
}


def plan_delta(grad_out: Tensor, grad_lse: Tensor, out: Tensor, delta: Tensor) -> Launch:
    """delta (B, T, H) float32 = sum(grad_out * out) - grad_lse."""
    dim, rows, block = out.shape[-1], delta.numel(), 32
    args = {"grad_ptr": grad_out, "out_ptr": out, "grad_lse_ptr": grad_lse, "delta_ptr": delta, "N": rows}
    constants = {"D": dim, "BD": prepare.next_power(dim, 16), "BR": block}
    return Launch(delta_kernel, -(-rows // block), args, constants, 4, 1)


def plan_queries(
    p: Problem, scale: float, doc_ids: Tensor | None, grad_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    arch: str,
) -> Launch:  # fmt: skip
    """The launch that gives dq; the tensors may be on the meta device if it is only to be compiled."""
    tile = choose_tile(QUERY_TILES, arch, p.q)
    constants = row_constants(p, tile, arch, doc_ids is not None) | {"TURN": 2 if p.swapped else 1}
    grid, args = row_args(p, scale, constants)
    (qa, qb), (k2a, k2b), reach = p.right(p.q), p.left(p.k2), prepare.reach(doc_ids, p.q.shape[1])
    tensors = {
        "qa_ptr": qa, "qb_ptr": qb, "grad_ptr": grad_out, "k_ptr": p.k, "v_ptr": p.v, "k2a_ptr": k2a, "k2b_ptr": k2b,
        "v2_ptr": p.v2, "reach_ptr": lse if reach is None else reach, "lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dq,
    }  # fmt: skip
    return Launch(queries_kernel, grid, {**tensors, **args, "scale": scale}, constants, tile.warps, tile.stages)


def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, out: Tensor,
    lse: Tensor, w1: int, w2: int, form: str, scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k2, v2, each contiguous in its input's shape, in dtype (the inputs').

    grad_out and out (B, T, H, D), grad_lse and lse (B, T, H) float32; grad_lse may be zeros. The same bits every time.
    """
    p = prepare.problem(q, k, v, k2, v2, w1, w2, form, k2_bias, v2_bias)
    grad_out, grad_lse, out, lse = (x.contiguous() for x in (grad_out, grad_lse, out, lse))
    arch = prepare.target(q.device)
    dq, delta = torch.empty_like(p.q, dtype=dtype), torch.empty_like(lse)
    if not dq.numel():
        dk, dv, dk2, dv2 = (torch.zeros(x.shape, dtype=dq.dtype, device=x.device) for x in (k, v, k2, v2))
        return dq, dk, dv, dk2, dv2
    plan_delta(grad_out, grad_lse, out, delta).run()
    plan_queries(p, scale, doc_ids, grad_out, lse, delta, dq, arch).run()
    dk, dv, dk2, dv2 = key_gradients(p, scale, doc_ids, grad_out, lse, delta, arch, dq.dtype)
    return (dq, dk2, dv2, dk, dv) if p.swapped else (dq, dk, dv, dk2, dv2)

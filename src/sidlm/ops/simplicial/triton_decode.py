"""2-simplicial decoding in Triton: a few new tokens against ring buffers ("Fast and Simplex", arXiv 2507.02754).

For one new token all virtual queries u[h, s] = q[h] o k2[i - s] of the heads h of a group share one window of keys, so
the whole step is one product of (head, offset) rows with w1 keys. It is split over row tiles, over tiles of the short
axis and over the keys, until the programs fill the device: at batch 1 that is what decides the time. A program reduces
its rows over the offsets itself (an epilogue with v2), so what it leaves behind is one vector a head; `_merge` weighs
the vectors of the splits by their LSE. Nothing depends on the sequence's length, and every shape is known on the host.
"""

from functools import cache, lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial import prepare
from sidlm.ops.simplicial.prepare import Launch, next_power

PROCESSORS_ASSUMED = 132
"""Multiprocessors to fill when there is no device to ask (the interpreter): those of an H200."""


@triton.jit
@no_type_check
def _virtual_queries(
    q_row, k2_row, row_mask, dim, bias, BD: tl.constexpr, DETERMINANT: tl.constexpr, SWAPPED: tl.constexpr
):
    """u [rows, BD] in float32 from pointers [rows, 1] to rows of q and k2; zero in rows that are masked."""
    d = tl.arange(0, BD)[None, :]
    mask = row_mask[:, None] & (d < dim)  # [rows, BD]
    if not DETERMINANT:
        q = tl.load(q_row + d, mask=mask, other=0.0).to(tl.float32)
        k2 = tl.load(k2_row + d, mask=mask, other=0.0).to(tl.float32)
        return q * (k2 + bias)
    # k2 x q per chunk of three: u[d] = k2[a] q[b] - k2[b] q[a], where a, b are the chunk's other two in cyclic order
    whole = dim // 3 * 3
    first, second = d // 3 * 3 + (d + 1) % 3, d // 3 * 3 + (d + 2) % 3
    chunked = d < whole
    # exchanging the two axes exchanges two rows of the determinant; the last dim % 3 are a plain product either way
    a = tl.where(chunked, second if SWAPPED else first, d)
    b = tl.where(chunked, first if SWAPPED else second, d)
    q_a = tl.load(q_row + a, mask=mask & chunked, other=0.0).to(tl.float32)
    q_b = tl.load(q_row + b, mask=mask, other=0.0).to(tl.float32)
    k2_a = tl.load(k2_row + a, mask=mask, other=0.0).to(tl.float32) + bias
    k2_b = tl.load(k2_row + b, mask=mask & chunked, other=0.0).to(tl.float32) + bias
    return k2_a * q_b - k2_b * q_a


@triton.jit(do_not_specialize=["ids_length", "ids_stride"])
@no_type_check
def _attend(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, lengths_ptr, ids_ptr, part_ptr, part_lse_ptr,
    n, groups, per_group, dim, slots1, slots2, w1, w2, keys_per_split, head_tiles, key_splits,
    ids_length, ids_stride, q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, k2_b, k2_s, k2_g, v2_b, v2_s, v2_g,
    scale, k_bias, v_bias, k2_bias, v2_bias,
    BH: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, OFFSET_TILES: tl.constexpr,
    DETERMINANT: tl.constexpr, SWAPPED: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and LSE of BH heads over BS offsets and keys_per_split keys.

    Grid B * n * groups * head_tiles * OFFSET_TILES * key_splits; part (B, n, H, splits, D), part_lse (B, n, H, splits)
    with splits = key_splits * OFFSET_TILES.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    BM: tl.constexpr = BH * BS
    pid = tl.program_id(0)
    split, pid = pid % key_splits, pid // key_splits
    offset_tile, pid = pid % OFFSET_TILES, pid // OFFSET_TILES
    head_tile, pid = pid % head_tiles, pid // head_tiles
    token, g = pid // groups, pid % groups
    b, t = (token // n).to(tl.int64), token % n
    position = tl.load(lengths_ptr + b).to(tl.int32) - n + t  # of this query in its sequence; negative: none
    row, key, d = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BD)
    head, offset = head_tile * BH + row // BS, offset_tile * BS + row % BS  # [BM]
    row_sees = (head < per_group) & (offset < w2) & (offset <= position)
    own = 0
    if HAS_DOCS:
        ids_ptr += b * ids_stride + ids_length - n + t  # of this query; earlier positions lie before it
        own = tl.load(ids_ptr)
        back = ids_length - n + t
        row_sees &= (own >= 0) & (offset <= back)
        row_sees &= tl.load(ids_ptr - offset, mask=row_sees, other=-1) == own
    slot = tl.where(row_sees, position - offset, 0) % slots2
    q_row = q_ptr + b * q_b + t * q_t + (g * per_group + head[:, None]) * q_h
    u = _virtual_queries(
        q_row, k2_ptr + b * k2_b + g * k2_g + slot[:, None] * k2_s, row_sees, dim, k2_bias, BD, DETERMINANT, SWAPPED
    )  # [BM, BD]
    scale *= LOG2E
    shift = tl.sum(u, 1) * (k_bias * scale)  # what a constant added to every key adds to a row's logits
    u = u.to(k_ptr.dtype.element_ty)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    end = tl.minimum(tl.minimum((split + 1) * keys_per_split, w1), position + 1)
    for start in range(split * keys_per_split, end, BK):
        behind = start + key  # [BK] positions behind the query
        sees = behind < end
        if HAS_DOCS:
            sees &= (own >= 0) & (behind <= ids_length - n + t)
            sees &= tl.load(ids_ptr - behind, mask=sees, other=-1) == own
        at = tl.where(sees, position - behind, 0) % slots1
        # a slot that nobody sees may hold anything, NaN too: masked in the load, not only in the weights
        key_mask = sees[:, None] & (d < dim)[None, :]
        k = tl.load(k_ptr + b * k_b + g * k_g + at[:, None] * k_s + d[None, :], mask=key_mask, other=0.0)  # [BK, BD]
        v = tl.load(v_ptr + b * v_b + g * v_g + at[:, None] * v_s + d[None, :], mask=key_mask, other=0.0)
        logits = tl.dot(u, tl.trans(k), input_precision=PRECISION) * scale + shift[:, None]  # [BM, BK], log2
        logits = tl.where(row_sees[:, None] & sees[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - finite_top[:, None])
        decay = tl.exp2(top - finite_top)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    v2_mask = row_sees[:, None] & (d < dim)[None, :]
    v2 = tl.load(v2_ptr + b * v2_b + g * v2_g + slot[:, None] * v2_s + d[None, :], mask=v2_mask, other=0.0)
    acc = (acc + v_bias * total[:, None]) * (v2.to(tl.float32) + v2_bias)
    # one softmax over the offsets of a head
    top = tl.reshape(top, (BH, BS))
    head_top = tl.max(top, 1)
    head_top = tl.where(head_top == float("-inf"), 0.0, head_top)
    factor = tl.exp2(top - head_top[:, None])  # [BH, BS]
    head_total = tl.sum(tl.reshape(total, (BH, BS)) * factor, 1)  # [BH]
    out = tl.sum(tl.reshape(acc, (BH, BS, BD)) * factor[:, :, None], 1)  # [BH, BD]
    empty = head_total == 0.0
    out /= tl.where(empty, 1.0, head_total)[:, None]
    lse = tl.where(empty, float("-inf"), (head_top + tl.log2(head_total)) / LOG2E)
    own_head = head_tile * BH + tl.arange(0, BH)
    to = (token * groups + g).to(tl.int64) * per_group + own_head
    to = to * (key_splits * OFFSET_TILES) + split * OFFSET_TILES + offset_tile
    head_mask = own_head < per_group
    tl.store(part_lse_ptr + to, lse, mask=head_mask)
    out_mask = head_mask[:, None] & (d < dim)[None, :]
    tl.store(part_ptr + to[:, None] * dim + d[None, :], out.to(part_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
@no_type_check
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, dim, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr
):
    """One (token, head) a program: the splits' outputs weighed by their LSE. SPLITS: a power of two >= splits."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    each = tl.arange(0, SPLITS)
    lse = tl.load(part_lse_ptr + row * splits + each, mask=each < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - top), 0)
    acc = tl.zeros([BD], tl.float32)
    for start in range(0, splits, CHUNK):
        at = start + tl.arange(0, CHUNK)
        own = tl.load(part_lse_ptr + row * splits + at, mask=at < splits, other=float("-inf"))
        mask = (at < splits)[:, None] & (d < dim)[None, :]
        part = tl.load(part_ptr + (row * splits + at[:, None]) * dim + d[None, :], mask=mask, other=0.0)  # [CHUNK, BD]
        acc += tl.sum(part * tl.exp(own - top)[:, None], 0)
    empty = total == 0.0
    acc /= tl.where(empty, 1.0, total)
    tl.store(out_ptr + row * dim + d, acc.to(out_ptr.dtype.element_ty), mask=d < dim)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), top + tl.log(total)))


class Plan(NamedTuple):
    """Tiles and splits of one launch; all of it follows from shapes."""

    heads: int  # of a group, in one tile
    offsets: int  # in one tile
    keys: int  # in one step of the loop
    head_tiles: int
    offset_tiles: int
    key_splits: int
    keys_per_split: int
    warps: int
    stages: int

    @property
    def splits(self) -> int:
        """Partial results a head."""
        return self.offset_tiles * self.key_splits


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=256)
def plan(
    tokens: int, groups: int, per_group: int, dim: int, w1: int, w2: int, itemsize: int, processors: int, large: bool
) -> Plan:
    """Row tiles of at most 64 (head, offset), and as many splits of the keys as give every processor a program.

    tokens: B * n. w1: the longer window. large: see :func:`prepare.is_large`.
    """
    row_bytes = next_power(dim) * itemsize
    small = row_bytes > 512 or not large
    rows = 32 if small else 64
    keys = 32 if small or row_bytes > 256 else 64
    offsets = min(next_power(w2), rows)
    heads = max(min(next_power(per_group), rows // offsets), 16 // offsets)  # tensor cores take 16 rows and more
    head_tiles, offset_tiles = _ceil(per_group, heads), _ceil(w2, offsets)
    blocks = _ceil(w1, keys)
    wanted = _ceil(processors, tokens * groups * head_tiles * offset_tiles)
    per_split = _ceil(blocks, min(wanted, blocks))
    key_splits = _ceil(blocks, per_split)
    warps, stages = 4 if dim <= 128 or small else 8, 1 if small else 2
    return Plan(heads, offsets, keys, head_tiles, offset_tiles, key_splits, per_split * keys, warps, stages)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension dense, as the kernels read it; any other strides are fine."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launches(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, lengths: Tensor, w1: int, w2: int, form: str,
    scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None, out: Tensor, lse: Tensor, arch: str,
) -> list[Launch]:  # fmt: skip
    """One launch, or two where the work is split; the tensors may be on the meta device, to be compiled only."""
    batch, n, heads, dim = q.shape
    groups = k.shape[2]
    q, k, v, k2, v2 = (_rows(x) for x in (q, k, v, k2, v2))
    k_bias, v_bias = 0.0, 0.0
    swapped = w2 > w1
    if swapped:  # the longer window is the one that is multiplied with
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
        k_bias, v_bias, k2_bias, v2_bias = k2_bias, v2_bias, 0.0, 0.0
    large = arch == "interpreter" or prepare.is_large(arch)
    p = plan(batch * n, groups, heads // groups, dim, w1, w2, q.element_size(), _processors(q.device), large)
    part, part_lse = out, lse
    if p.splits > 1:
        part = q.new_empty((batch, n, heads, p.splits, dim), dtype=torch.float32)
        part_lse = q.new_empty((batch, n, heads, p.splits), dtype=torch.float32)
    ids = lengths[:, None] if doc_ids is None else _rows(doc_ids)  # without documents any pointer will do
    args = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "k2_ptr": k2, "v2_ptr": v2, "lengths_ptr": lengths, "ids_ptr": ids,
        "part_ptr": part, "part_lse_ptr": part_lse, "n": n, "groups": groups, "per_group": heads // groups, "dim": dim,
        "slots1": k.shape[1], "slots2": k2.shape[1], "w1": w1, "w2": w2, "keys_per_split": p.keys_per_split,
        "head_tiles": p.head_tiles, "key_splits": p.key_splits, "ids_length": ids.shape[1], "ids_stride": ids.stride(0),
        "scale": scale, "k_bias": k_bias, "v_bias": v_bias, "k2_bias": k2_bias, "v2_bias": v2_bias,
    }  # fmt: skip
    args |= dict(zip(("q_b", "q_t", "q_h"), q.stride(), strict=False))
    for name, ring in (("k", k), ("v", v), ("k2", k2), ("v2", v2)):
        args |= dict(zip((f"{name}_b", f"{name}_s", f"{name}_g"), ring.stride(), strict=False))
    block_dim = next_power(dim, 16)
    constants = {
        "BH": p.heads, "BS": p.offsets, "BK": p.keys, "BD": block_dim, "OFFSET_TILES": p.offset_tiles,
        "DETERMINANT": form == "determinant", "SWAPPED": swapped, "HAS_DOCS": doc_ids is not None,
        "PRECISION": prepare.precision(arch, q),
    }  # fmt: skip
    grid = batch * n * groups * p.head_tiles * p.offset_tiles * p.key_splits
    attend = Launch(_attend, grid, args, constants, p.warps, p.stages)
    if p.splits == 1:
        return [attend]
    args = {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse, "splits": p.splits, "dim": dim}
    padded = next_power(p.splits)
    constants = {"SPLITS": padded, "CHUNK": min(padded, 16), "BD": block_dim}
    return [attend, Launch(_merge, batch * n * heads, args, constants, num_warps=4, num_stages=1)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, lengths: Tensor, w1: int, w2: int, form: str,
    scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, n, H, D) in q's dtype and LSE (B, n, H), float32; arguments as in `two_simplicial_decode`."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors, arch = (q, k, v, k2, v2, lengths), prepare.target(q.device)
    if out.numel():
        with torch.cuda.device(q.device if q.is_cuda else -1):  # -1: as it is
            for launch in launches(*tensors, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, out, lse, arch):
                launch.run()
    return out, lse

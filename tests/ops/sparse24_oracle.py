"""What the packing kernels compute, from packed.py and its neighbours, and a comparison bit for bit."""

import torch

from sidlm.ops.sparse24.packed import Packed, pack, positions, unpack
from sidlm.ops.sparse24.quantize import power_of_two_scale, quantize_rows
from sidlm.ops.sparse24.select import select_2to4


def rounded(x: torch.Tensor, dtype: torch.dtype, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return quantize_rows(x) if fp8 else (x.to(dtype), None)


def activation(y1: torch.Tensor, fp8: bool) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    packed = pack(y1.float().relu().square(), select_2to4(y1))
    values, scale = rounded(packed.values, y1.dtype, fp8)
    act = Packed(values, packed.metadata, scale)
    counts = (unpack(act) > 0).sum(0).int()
    return act, counts, torch.stack(((y1 > 0).sum().int(), counts.sum().int()))


def gradient(dy2: torch.Tensor, act: Packed, fp8: bool) -> Packed:
    kept = dy2.unflatten(-1, (-1, 4)).gather(-1, positions(act.metadata)).flatten(-2)
    square = act.values.float() if act.scale is None else act.values.float() * act.scale[:, None]
    # torch's root of float32 is not always the nearest on a CPU
    values, scale = rounded(2 * square.double().sqrt().float() * kept.float(), dy2.dtype, fp8)
    return Packed(values, act.metadata, scale)


def columns(x: torch.Tensor, features: torch.Tensor, perm: torch.Tensor, length: int) -> torch.Tensor:
    out = x.new_zeros(len(features), length)
    out[:, : len(perm)] = x[perm][:, features].T
    return out


def transposed(
    p: Packed, features: torch.Tensor, perm: torch.Tensor, length: int, by: str, fp8: bool
) -> tuple[Packed, torch.Tensor]:
    x = columns(unpack(p), features, perm, length)
    mask = select_2to4(x, by=by)
    packed = pack(x, mask)
    values, scale = rounded(packed.values, p.values.dtype, fp8)
    if scale is not None:  # the largest of all tokens is among the kept
        of_all = power_of_two_scale(x.abs().amax(-1))
        assert torch.equal(scale.nan_to_num(-1.0), of_all.nan_to_num(-1.0))
    return Packed(values, packed.metadata, scale), torch.stack(((x != 0).sum(), (x.where(mask, 0) != 0).sum())).int()


def same(mine, expected, name: str = "") -> None:
    """Tuples of tensors are equal bit for bit, but for the bits of NaN."""
    for m, e in zip(mine, expected, strict=True):
        if isinstance(m, tuple):
            same(m, e, name)
            continue
        if m is None or e is None:
            assert m is e, name
            continue
        assert m.dtype == e.dtype and m.shape == e.shape and m.is_contiguous(), name
        if m.dtype.is_floating_point:
            m, e = m.float(), e.float()
            assert torch.equal(m.isnan(), e.isnan()), name
            m, e = (x.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int32) for x in (m, e))
        assert torch.equal(m, e), f"{name}: {(m != e).sum()} of {m.numel()} differ"


def tensors(T: int, F: int, dtype: torch.dtype, seed: int = 0, zeros: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """y1 and dy2 (T, F), in y1 coarse numbers, so that many are equal, a share of zeros and a row of them."""
    make = torch.Generator().manual_seed(seed)
    y1, dy2 = (torch.randn(T, F, generator=make, dtype=torch.float64) for _ in range(2))
    y1 = (y1 * 4).round() / 4 * (torch.rand(T, F, generator=make) >= zeros)
    y1[T // 2] *= T == 1  # not the only one
    return (y1 + 0.0).to(dtype), dy2.to(dtype)


NAN, INF = float("nan"), float("inf")
SPECIAL = [
    [1.0, 2.0, 3.0, 4.0, NAN, 1.0, 2.0, 3.0],
    [3.0, 2.0, 1.0, -NAN, 5.0, NAN, 6.0, 0.0],
    [NAN, NAN, 1.0, 2.0, NAN, NAN, NAN, NAN],
    [INF, 1.0, 2.0, 3.0, INF, INF, INF, 1.0],
    [NAN, INF, INF, INF, 2.0, INF, NAN, INF],
    [-INF, NAN, -INF, -INF, -1.0, -2.0, -3.0, -0.5],
    [-0.0, 0.0, -0.0, 0.0, -1.0, -0.0, 0.0, -1.0],
    [0.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0],
    [1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0],
    [1e-6, 1e-4, 3e-4, 1.0, 2e-4, 2e-4, 1e-3, 0.0],
    [200.0, 1e-3, 0.0, 255.0, 250.0, 3e-4, 2e-4, 1e-7],
]
"""Tokens of y1 with NaN, infinities, ties, zeros of both signs, what rounds to zero and what is large."""


def special(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """y1 and dy2 (11, 24) with `SPECIAL` values."""
    y1 = torch.tensor(SPECIAL).repeat(1, 3).to(dtype)
    dy2 = tensors(*y1.shape, dtype)[1]
    dy2[6, :4], dy2[7, 0], dy2[8, :3], dy2[9, :2] = NAN, INF, torch.tensor([INF, -INF, NAN]), 0.0
    return y1, dy2

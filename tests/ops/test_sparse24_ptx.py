"""The inline PTX of the packing kernels, run by a few lines of numpy, against what it stands for.

The interpreter has no inline assembly, so this is where it runs without a GPU. Only what the kernels use is understood:
instructions on 32 bits and on two halves of them.
"""

import operator
import re

import numpy as np
import pytest
import torch

from sidlm.ops.sparse24.packed import pack, positions
from sidlm.ops.sparse24.select import select_2to4

pytest.importorskip("triton")

import triton.language as tl

from sidlm.ops.sparse24 import triton_groups

HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COMPARE = {"ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "neu": operator.ne}


def lop3(a, b, c, table: int):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def execute(code, outputs: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Operands are tensors of one dtype of 16 bits and even length; results int16."""
    values = {f"${outputs + i}": x.view(torch.int16).numpy().view(np.uint32) for i, x in enumerate(inputs)}
    length = len(next(iter(values.values())))

    def read(name: str) -> np.ndarray:
        return values[name] if name in values else np.full(length, int(name, 0), np.uint32)

    def halves(name: str, kind: str) -> torch.Tensor:
        return torch.from_numpy(read(name).view(np.int16).copy()).view(HALVES[kind])

    def whole(x: torch.Tensor) -> np.ndarray:
        return x.view(torch.int16).numpy().view(np.uint32)

    for line in filter(None, (part.strip() for part in code.strip().strip("{}").split(";"))):
        name, *arguments = re.split(r"[\s,]+", line)
        what, *kinds = name.split(".")
        to, *arguments = arguments
        kind = kinds[-1] if kinds else ""
        if name == ".reg":
            continue
        if name == "mov.b32":
            values[to] = read(arguments[0])
        elif name == "and.b32":
            values[to] = read(arguments[0]) & read(arguments[1])
        elif name == "lop3.b32":
            values[to] = lop3(*(read(x) for x in arguments[:3]), int(arguments[3], 0))
        elif what == "abs":
            values[to] = whole(halves(arguments[0], kind).abs())
        elif what == "add":
            values[to] = whole(halves(arguments[0], kind) + halves(arguments[1], kind))
        elif what in ("min", "max"):
            a, b = (halves(x, kind) for x in arguments)
            # the number of the two, or NaN
            choose = {"min": torch.fmin, "max": torch.maximum if "NaN" in kinds else torch.fmax}[what]
            values[to] = whole(choose(a.float(), b.float()).to(a.dtype))
        elif what == "set":
            a, b = (halves(x, kind) for x in arguments)
            holds = COMPARE[kinds[0]](a.float(), b.float())
            values[to] = whole(holds.to(a.dtype)) if kinds[1] == kind else whole(-holds.to(torch.int16))
        else:
            raise NotImplementedError(line)
    return [torch.from_numpy(values[f"${i}"].view(np.int16).copy()) for i in range(outputs)]


def groups(dtype: torch.dtype) -> torch.Tensor:
    """Every four of a few numbers, and some at random; (N, 4)."""
    inf, nan = float("inf"), float("nan")
    some = torch.tensor([-inf, -2.0, -0.0, 0.0, 1e-7, 1.0, 1.5, inf, nan])
    every = torch.cartesian_prod(*[some] * 4)
    other = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat((every, other, every[:1]))[: len(every) // 2 * 2 + 3000].to(dtype).contiguous()


def nibbles(metadata: torch.Tensor) -> torch.Tensor:
    """int16 (N,) from metadata of groups (N, 4), packed two in a row."""
    return torch.stack((metadata & 15, metadata >> 4), -1).flatten().short()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_choose(dtype, by):
    x = groups(dtype)
    low, high, nibble = execute(
        triton_groups._choose_ptx(DTYPES[dtype], by == "magnitude"), 3, [x[:, i].contiguous() for i in range(4)]
    )
    packed = pack(x.view(-1, 8), select_2to4(x.view(-1, 8), by=by))
    assert torch.equal(nibble, nibbles(packed.metadata).flatten())
    assert torch.equal(torch.stack((low, high), -1).flatten(), packed.values.view(torch.int16).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_spread_and_pick(dtype):
    x = groups(dtype)
    packed = pack(x.view(-1, 8), select_2to4(x.view(-1, 8)))
    nibble, at = nibbles(packed.metadata), positions(packed.metadata).view(-1, 2)
    low, high = packed.values.view(-1, 2).T.contiguous()
    dense = torch.zeros_like(x).scatter_(1, at, packed.values.view(-1, 2))
    spread = execute(triton_groups._spread_ptx(), 4, [low, high, nibble])
    assert torch.equal(torch.stack(spread, -1), dense.view(torch.int16))
    picked = execute(triton_groups._pick_ptx(), 2, [*(x[:, i].contiguous() for i in range(4)), nibble])
    assert torch.equal(torch.stack(picked, -1), packed.values.view(-1, 2).view(torch.int16))
    assert set(nibble.tolist()) == {4, 8, 9, 12, 13, 14}


@pytest.mark.parametrize("dtype", DTYPES)
def test_count_largest_and_relu(dtype):
    x, kind = groups(dtype).flatten(), DTYPES[dtype]
    for test, holds in (("gt", x > 0), ("neu", x != 0)):
        count = torch.full_like(x, 7.0)
        (out,) = execute(triton_groups._add_ptx(kind, test), 1, [count, x])
        assert torch.equal(out.view(dtype), (count + holds).to(dtype))
    so_far = x.roll(5).abs()
    (out,) = execute(triton_groups._largest_ptx(kind), 1, [so_far, x])
    expected = torch.maximum(so_far, x.abs())
    assert torch.equal(out.view(dtype).nan_to_num(-1.0), expected.nan_to_num(-1.0))
    (out,) = execute(triton_groups._relu_ptx(kind), 1, [x])
    assert torch.equal(out.view(dtype).nan_to_num(-1.0), x.clamp_min(0).nan_to_num(-1.0))

"""A few instructions of PTX in numpy: a register is an array of 32 bits, one element for each thread.

The interpreter has no inline assembly, so this is where blocks of it run without a GPU. Only what the kernels of 2:4
sparsity use is understood.
"""

import operator
import re

import numpy as np
import torch

from sidlm.ops.sparse24.quantize import FP8, LARGEST

HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
COMPARE = {"ge": operator.ge, "gt": operator.gt, "eq": operator.eq, "neu": operator.ne}


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        which = selectors >> np.uint32(4 * i) & 15
        byte = (both >> (8 * (which & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, 255, 0).astype(np.uint32)
        out |= np.where(which & 8, sign, byte) << np.uint32(8 * i)
    return out


class Registers:
    def __init__(self, inputs: list[np.ndarray], first: int):
        self.values = {f"${first + i}": x.copy() for i, x in enumerate(inputs)}
        self.length = len(inputs[0])

    def read(self, name: str) -> np.ndarray:
        if name in self.values:
            return self.values[name]
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(self.length, number & 0xFFFFFFFF, np.uint32)

    def float(self, name: str) -> np.ndarray:
        return self.read(name).view(np.float32)

    def halves(self, name: str, kind: str) -> torch.Tensor:
        return torch.from_numpy(self.read(name).view(np.int16).copy()).view(HALVES[kind])


def _bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x.astype(np.float32).view(np.uint32)
    return x.contiguous().view(torch.int16).numpy().view(np.uint32).copy()


def _on_halves(r: Registers, what: str, kinds: list[str], names: list[str]) -> np.ndarray:
    dtype = HALVES[kinds[-1]]
    x = [r.halves(name, kinds[-1]).float() for name in names]
    if what == "set":
        holds = COMPARE[kinds[0]](*x)
        return _bits(holds.to(dtype)) if kinds[1] == kinds[-1] else _bits(-holds.to(torch.int16))
    largest = torch.maximum if "NaN" in kinds else torch.fmax
    does = {
        "min": torch.fmin, "max": largest, "add": torch.add, "mul": torch.mul, "abs": torch.abs,
        "fma": lambda a, b, c: a * b + c,
    }  # fmt: skip
    return _bits(does[what](*x).to(dtype))


def _to_fp8(r: Registers, name: str) -> np.ndarray:
    x = torch.from_numpy(r.float(name).copy()).clamp(-LARGEST, LARGEST)
    return x.to(FP8).view(torch.uint8).numpy().astype(np.uint32)


def _one(r: Registers, name: str, names: list[str]) -> np.ndarray:
    """The result of an instruction on 32 bits."""
    integer = {
        "mov.b32": lambda x: x.copy(), "and.b32": operator.and_, "or.b32": operator.or_,
        "shl.b32": operator.lshift, "shr.u32": operator.rshift, "mul.lo.u32": operator.mul,
        "mad.lo.u32": lambda x, y, z: x * y + z, "prmt.b32": prmt,
    }  # fmt: skip
    wide = np.longdouble
    number = {
        "mul.f32": operator.mul, "neg.f32": operator.neg, "max.f32": np.fmax, "max.NaN.f32": np.maximum,
        # the worst guess that the instruction may make
        "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x.astype(np.float64)) * (1 + 2.0**-22),
        "fma.rn.f32": lambda x, y, z: x.astype(wide) * y.astype(wide) + z.astype(wide),
    }  # fmt: skip
    name = name.replace(".ftz", "")
    if name in integer:
        return integer[name](*(r.read(x) for x in names))
    if name in number:
        return _bits(number[name](*(r.float(x) for x in names)))
    if name == "lop3.b32":
        return lop3(*(r.read(x) for x in names[:3]), int(names[3], 0))
    if name == "cvt.rn.satfinite.e4m3x2.f32":
        return _to_fp8(r, names[1]) | _to_fp8(r, names[0]) << np.uint32(8)
    if name == "setp.nan.f32":
        return np.isnan(r.float(names[0])).astype(np.uint32)
    if name == "selp.f32":
        return np.where(r.read(names[2]) != 0, r.read(names[0]), r.read(names[1]))
    raise NotImplementedError(name)


def execute(code: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Registers $0 .. of a block whose operands are uint32 (N,), float32 as its bits; uint64 for a pair of them."""
    r = Registers(inputs, outputs)
    with np.errstate(all="ignore"):
        for line in filter(None, (part.strip() for part in code.strip().removeprefix("{").split(";"))):
            if line == "}" or line.startswith(".reg"):
                continue
            name, rest = line.split(None, 1)
            if halves := re.fullmatch(r"\{(\w+), (\w+)\}, (\S+)", rest):
                one, other, whole = halves.groups()
                bits = 8 * r.read(whole).itemsize // 2
                for part, x in ((one, r.read(whole)), (other, r.read(whole) >> r.read(whole).dtype.type(bits))):
                    r.values[part] = (x & x.dtype.type((1 << bits) - 1)).astype(np.uint32)
            elif halves := re.fullmatch(r"(\S+), \{(\w+), (\w+)\}", rest):
                whole, one, other = halves.groups()
                r.values[whole] = r.read(one) | r.read(other) << np.uint32(16)
            else:
                to, *names = re.split(r",\s*", rest)
                what, *kinds = name.split(".")
                on_halves = bool(kinds) and kinds[-1] in HALVES
                out = _on_halves(r, what, kinds, names) if on_halves else _one(r, name, names)
                r.values[to] = np.asarray(out, dtype=np.uint32)
    return [r.values[f"${i}"] for i in range(outputs)]

"""Products on sm_90a by hopper_product.cu: a 2:4 sparse operand, or a result that leaves 2:4 sparse.

The sparse operand's metadata stays as the kernels that pack write it (the plain layout), and scales are applied to the
accumulators.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sidlm.ops import nvrtc
from sidlm.ops.sparse24.packed import Packed, unpack
from sidlm.ops.sparse24.products import Product, difference
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.select import select_2to4

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = (torch.bfloat16, torch.float16, FP8)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 and float8_e4m3fn, not {dtype}"
    return nvrtc.why_not(device, (9, 0))


@functools.cache
def failure(device: torch.device) -> str | None:
    """Why `packed_product` gives something else than a product that is packed then, on a small example, or None."""
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 256, generator=make).bfloat16().to(device) for n in (192, 320))
    packed = Packed(a.new_empty(192, 160), a.new_empty(192, 40, dtype=torch.uint8))
    try:
        packed_product(a, b, packed)
    except Exception as error:  # whatever the compiler or the driver raises, it is not to be used
        return f"failed on a small product: {type(error).__name__}: {str(error)[:120]}"
    y = (a.float() @ b.float().T).bfloat16().float()
    expected = y.relu().square() * select_2to4(y)
    wrong = (unpack(packed).float() - expected).norm() / expected.norm()
    return None if wrong < 0.02 else f"computed a small product wrong, by {float(wrong):.1e}"


class Variant(NamedTuple):
    """What is compiled: the constants of hopper_product.cu, which says what they mean."""

    sparse: bool
    bytes: int
    fp16: bool = False
    turned: bool = False
    scaled: bool = False
    pack: bool = False
    bn: int = 256
    warpgroups: int = 2
    blocks: int = 1
    stages: int = 5
    slots: int = 3
    cluster: int = 2
    group: int = 8

    @property
    def rows(self) -> int:
        """Of a block's tile."""
        return 64 * self.warpgroups * self.blocks

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        stage = self.bn * 128 + self.rows * (64 if self.sparse else 128)
        return self.stages * stage + (self.slots * self.rows * 32 if self.sparse else 0) + 16 * self.stages

    @property
    def source(self) -> str:
        return _source(self)


@functools.cache
def _source(variant: Variant) -> str:
    return nvrtc.assembled(variant._asdict(), _multiply(variant), SOURCE.read_text(encoding="utf-8"))


def _multiply(variant: Variant) -> str:
    """The function `multiply`: one wgmma of 64 rows, accumulated in registers."""
    kind = "e4m3" if variant.bytes == 1 else "f16" if variant.fp16 else "bf16"
    k = 32 // variant.bytes * (2 if variant.sparse else 1)
    first, sparse = variant.bn // 2, variant.sparse
    registers = ", ".join(f"%{i}" for i in range(first))
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(first))
    last = first + 3 if sparse else first + 2
    turned = "" if variant.bytes == 1 else f", 0, {int(variant.turned)}"
    metadata = f", %{first + 2}, %{last + 1}" if sparse else ""
    return f"""
{"template <int SELECTOR> " if sparse else ""}__device__ __forceinline__ void multiply(
    float (&c)[{first}], unsigned long long a, unsigned long long b, {"unsigned e, " if sparse else ""}int add) {{
  asm volatile("{{.reg .pred add; setp.ne.b32 add, %{last}, 0;\\n"
    "wgmma.mma_async{".sp" if sparse else ""}.sync.aligned.m64n{variant.bn}k{k}.f32.{kind}.{kind} "
    "{{{registers}}}, %{first}, %{first + 1}{metadata}, add, 1, 1{turned};}}"
    : {outputs} : "l"(a), "l"(b), {'"r"(e), ' if sparse else ""}"r"(add){', "n"(SELECTOR)' if sparse else ""});
}}
"""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run(variant: Variant, maps: list, rest: list, M: int, N: int, K: int, device: torch.device) -> None:
    tiles = -(-M // (variant.rows * variant.cluster)) * -(-N // variant.bn)
    blocks = variant.cluster * min(tiles, _multiprocessors(device) // variant.cluster)
    kernel = nvrtc.function(variant.source, "product", variant.shared, device.index or 0)
    nvrtc.launch(kernel, blocks, 128 * (variant.warpgroups + 1), variant.shared, [*maps, *rest, M, N, K])


def _second(variant: Variant, b: Tensor):
    """The copy engine's map of b (N, K), or of b' that lies as (K, N)."""
    box = (128, 64) if variant.turned else (128, variant.bn // variant.cluster)
    return nvrtc.tensor_map(b.T if variant.turned else b, box, 128)


SHAPES = ((256, 1), (192, 2))
"""Tiles of products of packed operands: columns, and 64 rows so many times for each warpgroup."""


def _shape(M: int, N: int, size: int, device: torch.device) -> dict[str, int]:
    """The tile with which all are done first. What takes time is shared memory: B is read once for each 64 rows."""
    if size == 1:  # whose metadata come with bank conflicts in higher tiles
        return {}

    def cost(shape: tuple[int, int]) -> int:
        bn, rows = shape[0], 128 * shape[1]
        rounds = -(-(-(-M // rows) * -(-N // bn)) // _multiprocessors(device))
        return rounds * (rows // 64 * bn * 128 + rows * 80 + bn * 128)

    bn, blocks = min(SHAPES, key=cost)
    return {"bn": bn, "blocks": blocks, "group": 8 // blocks}


def sparse_product(p: Packed, b: Tensor, b_scale: Tensor | None, **how) -> Tensor:
    """p (M, K), plain metadata, @ b.T with b (N, K), times both scales: (M, N) in b's dtype, bfloat16 for e4m3.

    K is a multiple of 128, N of 8. b is contiguous, or for 16 bits b.T is. how: fields of `Variant`.
    """
    (M, K), N, size = (len(p.values), 2 * p.values.shape[1]), len(b), b.element_size()
    variant = Variant(True, size, fp16=b.dtype == torch.float16, turned=not b.is_contiguous(), scaled=size == 1)
    if size == 1 and K % 256:  # a tile ends within a slot of metadata, so three serve fewer stages
        variant = variant._replace(stages=4)
    variant = variant._replace(**(_shape(M, N, size, b.device) | how))
    out = b.new_empty(M, N, dtype=torch.bfloat16 if size == 1 else b.dtype)
    maps = [
        nvrtc.tensor_map(p.values, (64, variant.rows), 64),
        _second(variant, b),
        nvrtc.tensor_map(p.metadata, (32, variant.rows), 32),
    ]
    _run(variant, maps, [p.scale, b_scale, out, None], M, N, K, b.device)
    return out


FEW = Variant(False, 1, scaled=True, bn=192, warpgroups=3, stages=4, slots=0)
"""Of products of few rows"""


def few_rows(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """e4m3 a (M, K) @ b.T with b (N, K), both contiguous, times both scales, in bfloat16.

    K is a multiple of 128, N of 8.
    """
    (M, K), N = a.shape, len(b)
    out = a.new_empty(M, N, dtype=torch.bfloat16)
    maps = [nvrtc.tensor_map(a, (128, FEW.rows), 128), _second(FEW, b)]
    _run(FEW, [*maps, maps[0]], [a_scale, b_scale, out, None], M, N, K, a.device)
    return out


@functools.cache
def few_failure(device: torch.device) -> str | None:
    """Why `few_rows` cannot be used here, or computes a small example wrong; or None."""
    if reason := why_not(device, FP8):
        return reason
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 512, generator=make).to(device).to(FP8) for n in (448, 328))
    a_scale, b_scale = torch.rand(448, device=device), torch.rand(328, device=device)
    try:
        product = few_rows(a, a_scale, b, b_scale)
    except Exception as error:  # whatever the compiler or the driver raises, it is not to be used
        return f"failed on a small product: {type(error).__name__}: {str(error)[:120]}"
    wrong = difference(product, a.float() @ b.float().T * a_scale[:, None] * b_scale)
    return None if wrong < 0.02 else f"computed a small product wrong, by {wrong:.1e}"


def takes_few_rows(a: Tensor, b: Tensor) -> bool:
    """Whether `few_rows` takes these and its tiles fill the device: then it is a fourth faster than the library."""
    fits = a.dtype == b.dtype == FP8 and a.is_contiguous() and b.is_contiguous() and len(b) % 8 == 0
    if not fits or a.shape[1] % 128 or few_failure(a.device) is not None:
        return False
    tiles = 2 * -(-len(a) // (2 * FEW.rows)) * -(-len(b) // FEW.bn)
    rounds = tiles / _multiprocessors(a.device)
    return rounds / math.ceil(rounds) > 0.75


def multiply(p: Packed, b: Tensor, b_scale: Tensor | None) -> Product:
    """`sparse_product` for b (N, K) with any strides."""
    if not (b.is_contiguous() or (b.T.is_contiguous() and b_scale is None)):  # e4m3 is taken along K alone
        b = b.contiguous()
    return Product(sparse_product(p, b, b_scale))


def packs(a: Tensor, b: Tensor) -> bool:
    """Whether `packed_product` takes these."""
    fits = a.dtype == b.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous() and a.shape[1] % 8 == 0
    return fits and len(b) % 64 == 0 and (why_not(a.device, a.dtype) or failure(a.device)) is None


PACKING = Variant(False, 2, pack=True, bn=192, blocks=2, stages=4, slots=0, group=4)


def packed_product(a: Tensor, b: Tensor, packed: Packed, **how) -> None:
    """relu(a @ b.T)^2 for bfloat16 a (M, K) and b (N, K), of every four neighbours of a row the two largest, packed.

    Into packed: values (M, N / 2) and plain metadata (M, N / 8). K is a multiple of 8, N of 64. Where fewer than two of
    four are not 0, the metadata may name other zeros than `select_2to4` does, which compares what relu has not seen.
    """
    (M, K), N = a.shape, len(b)
    variant = PACKING._replace(**how)
    maps = [
        nvrtc.tensor_map(a, (128, variant.rows), 128),
        _second(variant, b),
        nvrtc.tensor_map(a, (128, variant.rows), 128),
    ]
    _run(variant, maps, [None, None, packed.values, packed.metadata], M, N, K, a.device)

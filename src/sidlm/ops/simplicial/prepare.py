"""What the kernels of 2-simplicial attention share on the launch side: one form of the problem, documents, launches.

Positions are counted on the axis of the queries, 0 .. T-1; a key of the first axis at position j is row j + S1 - T of
k, so the keys before the first query have negative positions. The same holds for the second axis.

**The determinant by permuted copies.** Per chunk of three, (x cross y)[d] = x[p1 d] y[p2 d] - x[p2 d] y[p1 d] with p1,
p2 the two rotations of the chunk. A kernel that is handed `xa, xb = left(x)` and `ya, yb = right(y)` forms
`xa * yb - xb * ya` with plain vector loads; the last D mod 3 dimensions, a plain product, come out of the same formula
because there xa = x, xb = 0, ya = 0, yb = y. When the axes trade places the determinant changes sign: p1 and p2 do too.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
WIDE = 1 << 31  # elements of a sequence from which offsets take 64 bits
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: a question that torch.compile cannot trace
NOWHERE = 1 << 30  # a position before or after every other, far from the ends of int32


class Problem(NamedTuple):
    """The inputs, contiguous, the longer window on the first axis; the biases belong to the second axis."""

    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, S1, G, D)
    v: Tensor  # (B, S1, G, D)
    k2: Tensor  # (B, S2, G, D)
    v2: Tensor  # (B, S2, G, D)
    w1: int
    w2: int
    determinant: bool
    k2_bias: float
    v2_bias: float
    swapped: bool

    @property
    def shape(self) -> tuple[int, int, int, int, int, int, int]:
        """B, T, S1, S2, G, R, D."""
        batch, steps, heads, dim = self.q.shape
        groups = self.k.shape[2]
        return batch, steps, self.k.shape[1], self.k2.shape[1], groups, heads // groups, dim

    @property
    def wide(self) -> bool:
        """Whether offsets within a sequence overflow 32 bits."""
        return max(x[:1].numel() for x in (self.q, self.k, self.k2)) >= WIDE

    def left(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of x (..., D) for the left side of the product; x itself twice for the trilinear form."""
        return self._copies(x, zero=1)

    def right(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of x (..., D) for the right side of the product; x itself twice for the trilinear form."""
        return self._copies(x, zero=0)

    def rotations(self) -> tuple[Tensor, Tensor]:
        """The index permutations (D,) behind the copies a and b; identity on the last D mod 3."""
        device, dim = self.q.device, self.q.shape[-1]
        d = torch.arange(dim, device=device)
        one, two = (torch.where(d < dim // 3 * 3, d // 3 * 3 + (d + r) % 3, d) for r in (1, 2))
        return (two, one) if self.swapped else (one, two)

    def _copies(self, x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
        if not self.determinant:
            return x, x
        if x.is_cuda:
            from sidlm.ops.simplicial import permute  # needs triton

            return permute.copies(x, self.swapped, zero)
        a, b = (x.index_select(-1, index) for index in self.rotations())
        (a, b)[zero][..., x.shape[-1] // 3 * 3 :] = 0
        return a, b


def problem(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, k2_bias: float,
    v2_bias: float,
) -> Problem:  # fmt: skip
    """Bring the inputs to one form. With w2 > w1 the axes trade places, and the biased one is written out."""
    swapped = w2 > w1
    if swapped:
        if k2_bias:
            k2 = k2 + k2_bias
        if v2_bias:
            v2 = v2 + v2_bias
        k, v, w1, k2, v2, w2, k2_bias, v2_bias = k2, v2, w2, k, v, w1, 0.0, 0.0
    w1, w2 = min(w1, k.shape[1]), min(w2, k2.shape[1])
    q, k, v, k2, v2 = (x.contiguous() for x in (q, k, v, k2, v2))
    return Problem(q, k, v, k2, v2, w1, w2, form == "determinant", float(k2_bias), float(v2_bias), swapped)


def extents(doc_ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Position of the first and of the last token of each token's document, int32 (B, L) like doc_ids (B, L).

    Padding gets an interval that holds nothing. Documents are runs of equal ids; no host synchronisation.
    """
    length = doc_ids.shape[1]
    at = torch.arange(length, device=doc_ids.device, dtype=torch.int32).expand_as(doc_ids)
    change = doc_ids[:, 1:] != doc_ids[:, :-1]
    begins = torch.nn.functional.pad(change, (1, 0), value=True)
    ends = torch.nn.functional.pad(change, (0, 1), value=True)
    first = torch.where(begins, at, -1).cummax(dim=1).values
    last = torch.where(ends, at, length).flip(1).cummin(dim=1).values.flip(1)
    shift, padding = length - steps, doc_ids < 0
    return (first - shift).masked_fill(padding, NOWHERE).int(), (last - shift).masked_fill(padding, -NOWHERE).int()


def reach(doc_ids: Tensor | None, steps: int) -> Tensor | None:
    """How many positions back, itself included, belong to a query's own document: int32 (B, T), 0 for padding."""
    if doc_ids is None:
        return None
    first = extents(doc_ids, steps)[0][:, -steps:]
    at = torch.arange(steps, device=doc_ids.device, dtype=torch.int32)
    return (at - first + 1).clamp_min(0).contiguous()


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, in words, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"needs a CUDA device, not {device.type} (or triton's interpreter, TRITON_INTERPRET=1)"
    if interpreted and dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 wrongly"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs a GPU of compute capability 8.0 or more, not {capability[0]}.{capability[1]}"
    return None


def why_not_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Gluon kernels for Hopper cannot run, in words, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {dtype}"
    usable = device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip
    if not usable or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return None


def target(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... for a device; "interpreter" where Triton has no device to run on."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_large(arch: str) -> bool:
    """Whether a block has the 160 KiB of shared memory that the large tiles take, else they fit 64 KiB."""
    return arch in ("sm_80", "sm_90", "sm_100", "sm_103")


def precision(arch: str, x: Tensor) -> str:
    """How tl.dot multiplies float32: three TF32 products keep its accuracy on tensor cores."""
    return "tf32x3" if x.dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def next_power(n: int, least: int = 1) -> int:
    """The power of two that is at least n and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


class Launch(NamedTuple):
    """One kernel launch, whole: what runs on a device is what a test compiles for another target."""

    kernel: Any
    grid: int | tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None  # for Triton's pipeliner; Gluon kernels pipeline by hand

    @property
    def options(self) -> dict[str, int]:
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return {"num_warps": self.num_warps, **stages}

    def run(self) -> None:
        grid = self.grid if isinstance(self.grid, tuple) else (self.grid,)
        with torch.cuda.device_of(next(x for x in self.args.values() if isinstance(x, Tensor))):
            self.kernel[grid](**self.args, **self.constants, **self.options)

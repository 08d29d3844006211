"""The rows of benchmarks/simplicial.py: shapes, what is timed at each, the suites, and the FLOPs of a row."""

import math
import random
from dataclasses import dataclass, field, replace

import torch
from _simplicial_baselines import causal_length

from sidlm.ops import dispatch
from sidlm.ops.simplicial import api
from sidlm.ops.simplicial.flops import backward_flops, forward_flops, visible_pairs

KINDS = ("forward", "backward", "step")  # step: forward and backward, timed as one
GROUPS = {"forward": ("forward",), "backward": ("backward", "step"), "decode": ("decode",), "baselines": ()}


@dataclass(frozen=True)
class Shape:
    B: int
    N: int
    H: int
    G: int
    D: int = 128
    window: tuple[int, int] = (512, 32)
    docs: bool = False
    """Documents of log-normal lengths, mean about 1,000 tokens, packed into the row."""
    past: int | None = None
    """Decode: tokens before the new one; N is 1."""


@dataclass(frozen=True)
class Variant:
    """One of the things a task times: an implementation of the op, or a baseline."""

    name: str
    form: str = "trilinear"
    impl: str | None = None
    compensate: bool = False
    baseline: str | None = None


OURS = Variant("sidlm")


@dataclass(frozen=True)
class Task:
    section: str
    kind: str
    shape: Shape
    variants: tuple[Variant, ...] = (OURS,)
    group: str = field(default="")
    """The word of --only that selects it; by kind unless given."""

    def selected(self, only: list[str]) -> bool:
        return self.group in only or (not self.group and any(self.kind in GROUPS[word] for word in only))


PAPER = Shape(1, 2048, 64, 1)
LLAMA = Shape(1, 8192, 32, 8)
BOTH_FORMS = (OURS, Variant("sidlm determinant", form="determinant"))
COMPENSATED = (OURS, Variant("sidlm compensated", compensate=True))


def baseline(name: str) -> Variant:
    return Variant(name, baseline=name)


def ceilings(shape: Shape, matmul: int = 8192) -> list[Task]:
    """What the device and ordinary attention reach: a matrix product, and causal SDPA of about the same FLOPs."""
    length = causal_length(visible_pairs(shape.N, shape.window))
    same_work = Shape(1, length, shape.H, shape.H, shape.D)
    pair = (baseline("causal SDPA cudnn"), baseline("causal SDPA flash"))
    square = Task("ceiling", "matmul", Shape(1, matmul, 1, 1), (baseline("matmul"),), "baselines")
    return [square, *(Task("ceiling", kind, same_work, pair, "baselines") for kind in ("forward", "backward"))]


def published_grid(batch: int, *, heads, windows, lengths, kind="forward") -> list[Task]:
    return [
        Task("published grid", kind, Shape(batch, n, h, 1, window=w)) for h in heads for w in windows for n in lengths
    ]


def decode_tasks(heads, batches, pasts) -> list[Task]:
    return [Task("decode", "decode", Shape(b, 1, h, g, past=p)) for h, g in heads for b in batches for p in pasts]


def against_others(shapes: dict[str, Shape]) -> list[Task]:
    """A baseline and this library at the same shape, taking turns."""
    return [
        Task("against " + name, kind, shape, (OURS, baseline(name)), "baselines")
        for name, shape in shapes.items()
        for kind in ("forward", "step")
    ]


def quick() -> list[Task]:
    tasks = ceilings(PAPER)[:1]
    tasks += [Task("published step", kind, PAPER) for kind in ("step", "forward", "backward")]
    tasks += ceilings(PAPER)[1:]
    tasks += [Task("Llama-8B-like", kind, LLAMA) for kind in ("forward", "step")]
    tasks += [Task("forms", kind, replace(PAPER, N=4096), BOTH_FORMS) for kind in ("forward", "step")]
    tasks += published_grid(4, heads=(64, 128), windows=((512, 32), (32, 512)), lengths=(8192,))
    tasks += decode_tasks(((64, 1), (32, 8)), (1, 32), (32768,))
    tasks += against_others({"flex": PAPER, "simplicial-attention": replace(PAPER, D=64)})
    return [*tasks, Task("implementations", "step", PAPER, implementations("cuda"))]


def full() -> list[Task]:
    """Most important first: --budget-seconds cuts the end off."""
    tasks = ceilings(PAPER)[:1]
    tasks += [Task("published step", kind, PAPER) for kind in ("step", "forward", "backward")]
    tasks += [Task("published step", kind, replace(PAPER, N=8192)) for kind in ("step", "forward", "backward")]
    tasks += ceilings(PAPER)[1:]
    tasks += [Task("Llama-8B-like", kind, LLAMA) for kind in ("forward", "step")]
    tasks += [Task("forms", kind, shape, BOTH_FORMS) for shape in (PAPER, LLAMA) for kind in ("forward", "step")]
    grid = {"heads": (64, 128), "windows": ((512, 32), (32, 512))}
    tasks += published_grid(4, **grid, lengths=(8192,))
    tasks += decode_tasks(((64, 1), (32, 8)), (1, 32), (32768,))
    tasks += against_others({"flex": PAPER, "simplicial-attention": replace(PAPER, D=64)})
    mha = Shape(1, 8192, 16, 16)
    tasks += [Task("MHA", kind, mha) for kind in ("forward", "step")]
    tasks += [Task("D=64", kind, replace(shape, D=64)) for shape in (PAPER, LLAMA) for kind in ("forward", "step")]
    packed = replace(LLAMA, N=16384, docs=True)
    tasks += [Task("documents", kind, s) for s in (packed, replace(packed, docs=False)) for kind in ("forward", "step")]
    tasks += [Task("compensated", kind, s, COMPENSATED) for s in (PAPER, LLAMA) for kind in ("forward", "step")]
    tasks += [Task("implementations", kind, PAPER, implementations("cuda")) for kind in ("forward", "step")]
    tasks += published_grid(4, heads=(64, 128), windows=((512, 32),), lengths=(2048, 8192), kind="step")
    tasks += published_grid(4, **grid, lengths=(1024, 2048, 4096))
    tasks += published_grid(4, heads=(64, 128), windows=((256, 32), (1024, 32)), lengths=(1024, 2048, 4096, 8192))
    tasks += decode_tasks(((64, 1), (32, 8)), (1, 32), (1024, 131072))
    tasks += against_others({"flex": LLAMA, "simplicial-attention": replace(mha, D=64)})
    return tasks + published_grid(
        4, heads=(64, 128), windows=(*grid["windows"], (256, 32), (1024, 32)), lengths=(16384,)
    )


def smoke() -> list[Task]:
    """Every kind of row at a size for a CPU."""
    shape = Shape(1, 96, 4, 2, 16, (24, 4))
    tasks = ceilings(shape, matmul=64)
    tasks += [Task("published step", kind, shape, implementations("cpu")) for kind in KINDS]
    tasks += [Task("forms", kind, shape, BOTH_FORMS) for kind in ("forward", "step")]
    tasks += [Task("documents", "step", replace(shape, docs=True))]
    tasks += published_grid(2, heads=(4, 8), windows=((24, 4), (4, 24)), lengths=(64, 96))
    tasks += [Task("decode", "decode", replace(shape, N=1, past=past)) for past in (3, 50)]
    return tasks + against_others({"flex": shape, "simplicial-attention": shape})


SUITES = {"quick": quick, "full": full, "smoke": smoke}


def implementations(device: str) -> tuple[Variant, ...]:
    """The default, and every other implementation that can run (less the oracle, which is no contestant)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.device(device)
    default = dispatch.choose("simplicial", api.IMPLEMENTATIONS, None, where, dtype)
    usable = (n for n, x in api.IMPLEMENTATIONS.items() if not x.emulated(where) and x.why_not(where, dtype) is None)
    return OURS, *(Variant(f"sidlm impl={n}", impl=n) for n in usable if n not in (default, "reference"))


def document_lengths(length: int, seed: int) -> list[int]:
    make, left, lengths = random.Random(seed), length, []
    while left:
        lengths.append(min(left, max(1, round(make.lognormvariate(math.log(1000) - 0.5, 1.0)))))
        left -= lengths[-1]
    return lengths


def flops_of(task: Task, variant: Variant, lengths: list[int] | None = None) -> int:
    """FLOPs of one call by the convention of benchmarks/simplicial.py; lengths: of the documents, if there are any."""
    shape = task.shape
    if task.kind == "matmul":
        return 2 * shape.N**3
    if variant.baseline is not None and "SDPA" in variant.baseline:
        forward = 2 * shape.N**2 * shape.D * shape.H * shape.B
        return {"forward": forward, "backward": forward * 5 // 2, "step": forward * 7 // 2}[task.kind]
    if task.kind == "decode":
        assert shape.past is not None
        return forward_flops(visible_pairs(1, shape.window, shape.past + 1, shape.past + 1), shape.H, shape.D, shape.B)
    pairs = visible_pairs(shape.N, shape.window, doc_lengths=lengths)
    forward, backward = (f(pairs, shape.H, shape.D, shape.B) for f in (forward_flops, backward_flops))
    return {"forward": forward, "backward": backward, "step": forward + backward}[task.kind]

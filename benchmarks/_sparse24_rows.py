"""The rows of benchmarks/sparse24.py: shapes, what is timed at each, and the suites."""

from dataclasses import dataclass, replace

PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class Shape:
    model: str
    T: int
    d: int
    F: int
    density: float = 0.1
    """Share of the activations that are not zero"""


@dataclass(frozen=True)
class Task:
    kind: str
    """forward or step (forward and backward) of a layer; gemm: one of its products; pack: one of its packings"""
    shape: Shape
    precision: str
    what: str = ""
    """Which product or packing"""

    @property
    def group(self) -> str:
        return "layer" if self.kind in ("forward", "step") else self.kind


MODELS = {"1.5B": (2048, 8192), "7B": (4096, 16384), "Llama-8B": (4096, 21504), "70B": (8192, 43008)}
"""d and F; F of Llama shapes is 1.5 times that of their SwiGLU layers: the same parameters"""
TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
GROUPS = ("layer", "gemm", "pack")
PRODUCTS = ("up", "down", "d_hidden", "d_x", "d_w_down", "d_w_up")
"""Of one step; the first and third are dense whatever the layer is"""
SPARSE_PRODUCTS = ("down", "d_x", "d_w_down", "d_w_up")
PACKINGS = ("activation", "gradient", "transposed activation", "transposed gradient", "rows", "transposed rows")


def shape(model: str, tokens: int, density: float = 0.1) -> Shape:
    return Shape(model, tokens, *MODELS[model], density)


def layers(model: str, tokens: int, density: float = 0.1) -> list[Task]:
    given = shape(model, tokens, density)
    return [Task(kind, given, precision) for precision in PRECISIONS for kind in ("forward", "step")]


def gemms(model: str, tokens: int, names: tuple[str, ...] = PRODUCTS) -> list[Task]:
    given = shape(model, tokens)
    return [Task("gemm", given, precision, name) for precision in PRECISIONS for name in names]


def packings(model: str, tokens: int) -> list[Task]:
    tasks = [Task("pack", shape(model, tokens), precision, name) for precision in PRECISIONS for name in PACKINGS]
    return [t for t in tasks if (t.precision, t.what) != ("bf16", "rows")]  # only quantised


def quick() -> list[Task]:
    tasks = layers("Llama-8B", 8192) + packings("Llama-8B", 8192) + gemms("Llama-8B", 8192)
    for tokens in (16384, 512, 1024, 2048, 4096):
        tasks += layers("Llama-8B", tokens)
    return tasks + [t for model in ("1.5B", "7B", "70B") for t in layers(model, 8192)]


def full() -> list[Task]:
    """Most important first: --budget-seconds cuts the end off."""
    tasks = quick()
    tasks += layers("Llama-8B", 32768)
    others = (2048, 512, 16384, 1024, 4096, 32768)  # where the crossovers lie first
    tasks += [t for tokens in others for model in ("7B", "1.5B", "70B") for t in layers(model, tokens)]
    tasks += [t for density in (0.02, 0.16) for t in layers("Llama-8B", 8192, density)]
    tasks += [t for model in MODELS for tokens in TOKENS[::-1] for t in gemms(model, tokens, SPARSE_PRODUCTS)]
    tasks += [t for model in MODELS for tokens in TOKENS[::-1] for t in gemms(model, tokens)]
    tasks += [t for tokens in (2048, 32768) for t in packings("Llama-8B", tokens)] + packings("70B", 8192)
    return list(dict.fromkeys(tasks))


def smoke() -> list[Task]:
    """Every kind of row at a size for a CPU."""
    tiny = Shape("tiny", 48, 32, 64)
    tasks = [replace(t, shape=replace(tiny, T=n)) for n in (48, 64) for t in layers("1.5B", n)]
    return tasks + [replace(t, shape=tiny) for t in gemms("1.5B", 48) + packings("1.5B", 48)]


SUITES = {"quick": quick, "full": full, "smoke": smoke}

"""The rows of benchmarks/train_speed.py: models, and the settings of `sid train` that make them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """One shape of model and batch."""

    preset: str
    layers: int
    vocab: int
    ffn: int
    seq_len: int
    batch_size: int
    micro_batch_size: int
    window: tuple[int, int] = (512, 32)


SIZES = {
    # Llama 3.2 1B: 1.24B parameters, tied
    "1b": Size("1b", 16, 128256, 8192, 4096, 16, 8),
    # Llama 3 8B's width in 12 of its 32 layers, 3.7B parameters: 16 bytes of each for weight, gradient and AdamW's
    # state in fp32 are 55 GiB, and activations that are kept whole about 30 of 139 GiB
    "8b-width": Size("8b", 12, 128256, 14336, 8192, 4, 2),
    # for a test on a CPU
    "tiny": Size("nano", 4, 512, 256, 64, 4, 2, (16, 4)),
}


@dataclass(frozen=True)
class Row:
    """One model in one precision."""

    size: str
    name: str
    overrides: dict = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    baseline: str = ""
    """"autocast" or "bf16": the transformers loop instead of `sid train`, with fp32 or bf16 weights"""
    packed: bool = False
    """rows of several documents instead of one"""
    kinds: tuple[str, ...] = ("full_attention",)
    """layer types of the smallest model that compiles what this one does"""


def layer_types(size: Size) -> list[str]:
    return ["full_attention" if (i + 1) % 4 else "simplicial_attention" for i in range(size.layers)]


def squared_relu(size: Size) -> dict:
    """Two matrices instead of SwiGLU's three: as many parameters."""
    return {"mlp_type": "squared_relu", "intermediate_size": 3 * size.ffn // 2}


def row(size: str, name: str) -> Row:
    """The row of this name."""
    of, full = SIZES[size], "full_attention"
    simplicial = {"layer_types": layer_types(of), "simplicial_window": list(of.window)}
    sparse = squared_relu(of) | {"mlp_sparsity": "2:4"}
    made = [
        Row(size, "bf16"),
        Row(size, "transformers autocast", baseline="autocast"),
        Row(size, "transformers bf16 weights", baseline="bf16"),
        # the first and the last block stay in bf16
        Row(size, "float8", settings=("--train.float8", "tensorwise"), kinds=(full,) * 3),
        Row(size, "simplicial", simplicial, kinds=(full, "simplicial_attention")),
        Row(size, "2:4", sparse, settings=("--sparsity.warmup_steps", "0")),
        Row(size, "squared relu, dense", squared_relu(of)),
        Row(size, "packed", packed=True),
    ]
    return next(r for r in made if r.name == name)


ORDER = [
    ("1b", "bf16"), ("1b", "transformers autocast"), ("1b", "simplicial"), ("1b", "2:4"), ("8b-width", "bf16"),
    ("8b-width", "simplicial"), ("8b-width", "2:4"), ("8b-width", "transformers autocast"), ("1b", "packed"),
    ("1b", "float8"), ("8b-width", "float8"), ("8b-width", "squared relu, dense"), ("1b", "squared relu, dense"),
]  # fmt: skip
"""What matters most first, so that a run cut by time has it."""


def rows(sizes: list[str]) -> list[Row]:
    if sizes == ["tiny"]:
        return [row("tiny", name) for name in dict.fromkeys(name for _, name in ORDER)]
    return [row(size, name) for size, name in ORDER if size in sizes]

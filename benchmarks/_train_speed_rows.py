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
    # Llama 3 8B's width, in as many layers as leave room for optimizer and activations: 2.8B parameters
    "8b-width": Size("8b", 8, 128256, 14336, 8192, 4, 2),
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


def simplicial(size: Size) -> dict:
    types = ["full_attention" if (i + 1) % 4 else "simplicial_attention" for i in range(size.layers)]
    return {"layer_types": types, "simplicial_window": list(size.window)}


def squared_relu(size: Size) -> dict:
    """Two matrices instead of SwiGLU's three: as many parameters."""
    return {"mlp_type": "squared_relu", "intermediate_size": 3 * size.ffn // 2}


def rows(sizes: list[str]) -> list[Row]:
    """What matters most first, so that a run cut by time has it."""
    found = [Row(size, "bf16") for size in sizes]
    found += [Row(size, "transformers autocast", baseline="autocast") for size in sizes]
    found += [Row(size, "float8", settings=("--train.float8", "tensorwise")) for size in sizes]
    found += [Row(size, "simplicial", simplicial(SIZES[size])) for size in sizes]
    sparse = ("--sparsity.warmup_steps", "0")
    found += [Row(size, "2:4", squared_relu(SIZES[size]) | {"mlp_sparsity": "2:4"}, sparse) for size in sizes]
    found += [Row(size, "squared relu, dense", squared_relu(SIZES[size])) for size in sizes]
    found += [Row(size, "transformers bf16 weights", baseline="bf16") for size in sizes]
    return found

"""The cells of the study of token efficiency: which models, how long, which seeds, and in which order.

A cell is one training run. Variants of one size have equal parameters (the feed-forward width makes up for k2_proj and
v2_proj) unless the name says otherwise; cells of one seed read the same rows in the same order. The order of the list
is the order in which cells start, so that a study that time cuts off has whole pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sidlm.models.config import SidConfig
from sidlm.models.flops import num_parameters, train_flops_per_token

SIZES: dict[str, dict[str, Any]] = {
    "xs": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 344},
    "s": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 704},
    "m": {"hidden_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 864},
    "l": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 1, "ff": 1408},
    "toy": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "ff": 64},
}
"""About 0.9M, 2.8M, 8.3M and 22M parameters without embeddings; "toy" tries the script out."""
LR = {"toy": 4e-3, "xs": 4e-3, "s": 2.8e-3, "m": 2.5e-3, "l": 2e-3}
"""Base learning rate: 2e-3 at width 512, the pilot's, and as 1/sqrt(width) below."""

SIMPLICIAL = {
    "simplicial_form": "trilinear", "simplicial_window": [128, 16], "simplicial_position": "rope",
    "simplicial_qk_norm": True, "simplicial_k2_bias": 1.0, "simplicial_v2_bias": 1.0,
}  # fmt: skip
DETERMINANT = {"simplicial_form": "determinant", "simplicial_position": "rotation", "simplicial_k2_bias": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"mixer": "sliding_attention", "sliding_window": 128},
    "trilinear": {"mixer": "simplicial_attention"},
    "determinant": {"mixer": "simplicial_attention"} | DETERMINANT,
    "deeper": {"deeper": True},
    "sliding every 2nd": {"mixer": "sliding_attention", "sliding_window": 128, "every": 2},
    "trilinear every 2nd": {"mixer": "simplicial_attention", "every": 2},
    "determinant every 2nd": {"mixer": "simplicial_attention", "every": 2} | DETERMINANT,
    "trilinear (512,32)": {"mixer": "simplicial_attention", "simplicial_window": [512, 32]},
    "trilinear (256,16)": {"mixer": "simplicial_attention", "simplicial_window": [256, 16]},
    "trilinear (128,8)": {"mixer": "simplicial_attention", "simplicial_window": [128, 8]},
    "trilinear (64,8)": {"mixer": "simplicial_attention", "simplicial_window": [64, 8]},
    "sliding 512": {"mixer": "sliding_attention", "sliding_window": 512},
    "trilinear, no norm": {"mixer": "simplicial_attention", "simplicial_qk_norm": False},
    "trilinear, no positions": {"mixer": "simplicial_attention", "simplicial_position": "none"},
    "trilinear, biases 0": {
        "mixer": "simplicial_attention", "simplicial_k2_bias": 0.0, "simplicial_v2_bias": 0.0,
    },
    "trilinear, biases 0, 1": {"mixer": "simplicial_attention", "simplicial_k2_bias": 0.0},
    "trilinear, scale d^-3/2": {"mixer": "simplicial_attention", "simplicial_scale": 64**-1.5},
    "trilinear, no norm, scale d^-3/2": {
        "mixer": "simplicial_attention", "simplicial_qk_norm": False, "simplicial_scale": 64**-1.5,
    },
    "determinant, no norm": {"mixer": "simplicial_attention", "simplicial_qk_norm": False} | DETERMINANT,
    "determinant, RoPE": {"mixer": "simplicial_attention"} | DETERMINANT | {"simplicial_position": "rope"},
    "determinant, v2 bias 0": {"mixer": "simplicial_attention", "simplicial_v2_bias": 0.0} | DETERMINANT,
    "determinant, scale d^-3/2": {"mixer": "simplicial_attention", "simplicial_scale": 64**-1.5} | DETERMINANT,
    "squared ReLU": {"mlp_type": "squared_relu"},
    "squared ReLU, down lr 0.1": {"mlp_type": "squared_relu", "down_lr": 0.1},
    "squared ReLU, lr x4, down lr 0.1": {"mlp_type": "squared_relu", "down_lr": 0.1, "lr_factor": 4.0},
    "2:4, down lr 0.1": {"mlp_type": "squared_relu", "mlp_sparsity": "2:4", "down_lr": 0.1},
}  # fmt: skip
"""Name -> fields of the model that differ from full attention with SwiGLU; `mixer` stands in every 4th layer."""
CORE = ("full", "sliding", "trilinear", "determinant", "deeper")
WINDOWS = ("trilinear (128,8)", "trilinear (256,16)", "trilinear (64,8)", "trilinear (512,32)", "sliding 512")
TREATMENTS = tuple(v for v in VARIANTS if v.startswith(("trilinear,", "determinant,")))
EVERY_2ND = tuple(v for v in VARIANTS if v.endswith("every 2nd"))
SQUARED_RELU = tuple(v for v in VARIANTS if v.startswith(("squared", "2:4")))

MILLION = 1_000_000
VOCABULARY = 16384
SEQ_LEN = 1024
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. lr is a factor of the size's base rate; tasks: whether answers of tasks are scored at the end."""

    group: str
    size: str
    variant: str
    seed: int
    steps: int
    batch: int = BATCH
    seq_len: int = SEQ_LEN
    lr: float = 1.0
    tasks: bool = False
    repeat: int = 0

    @property
    def name(self) -> str:
        repeat = f" run {self.repeat}" if self.repeat else ""
        return f"{self.size} {self.variant} {self.steps}x{self.batch} lr{self.lr:g} seed {self.seed}{repeat}"


@dataclass(frozen=True)
class Recipe:
    """What a cell's variant comes to at its size."""

    config: SidConfig
    fields: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    down_lr: float = 1.0


def recipe(cell: Cell, *, vocab: int = VOCABULARY) -> Recipe:
    """The model's fields, its config and learning rates."""
    spec = dict(VARIANTS[cell.variant])
    shape = dict(SIZES[cell.size])
    width = shape.pop("ff")
    base = shape | {
        "vocab_size": vocab, "head_dim": 64, "max_position_embeddings": 2048, "mlp_type": "swiglu",
        "intermediate_size": width, "layer_types": ["full_attention"] * shape["num_hidden_layers"],
    }  # fmt: skip
    lr = LR[cell.size] * cell.lr * spec.pop("lr_factor", 1.0)
    down_lr = spec.pop("down_lr", 1.0)
    fields = _deeper(base, cell.seq_len) if spec.pop("deeper", False) else _changed(base, spec)
    return Recipe(SidConfig(**fields), fields, lr, down_lr)


def _changed(base: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant with as many parameters as `base`, to a multiple of 8 of the feed-forward width."""
    spec = dict(spec)
    mixer, every = spec.pop("mixer", "full_attention"), spec.pop("every", 4)
    layers = base["num_hidden_layers"]
    types = [mixer if (i + 1) % every == 0 else "full_attention" for i in range(layers)]
    fields = base | (SIMPLICIAL if mixer == "simplicial_attention" else {}) | spec | {"layer_types": types}
    target = num_parameters(SidConfig(**base))
    dense = fields | {"mlp_sparsity": None}
    one, two = (num_parameters(SidConfig(**dense | {"intermediate_size": w})) for w in (8, 16))
    return fields | {"intermediate_size": 8 * (1 + round((target - one) / (two - one)))}


def _deeper(base: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """Full attention with more layers, nearest to the training FLOPs of the trilinear variant; not fewer than one."""
    target = train_flops_per_token(SidConfig(**_changed(base, VARIANTS["trilinear"])), seq_len)
    layers = base["num_hidden_layers"]
    options = [
        base | {"num_hidden_layers": n, "layer_types": ["full_attention"] * n} for n in range(layers + 1, layers + 4)
    ]
    return min(options, key=lambda f: abs(train_flops_per_token(SidConfig(**f), seq_len) - target))


def plan(*, million: int = MILLION) -> list[Cell]:
    """The whole study, most important first.

    million: tokens that count as one million; fewer shorten every run.
    """

    def cell(group: str, size: str, variant: str, seed: int, tokens: float, **others: Any) -> Cell:
        steps = max(2, round(tokens * million / (others.get("batch", BATCH) * SEQ_LEN)))
        return Cell(group=group, size=size, variant=variant, seed=seed, steps=steps, **others)

    core = [
        [cell("core", size, v, seed, 16.384, tasks=True) for size in ("l", "m", "s", "xs") for v in CORE]
        for seed in range(3)
    ]
    noise = [
        *(cell("noise", "s", "full", s, tokens) for tokens in (4.096, 8.192) for s in range(4)),
        *(cell("noise", "s", "full", s, 8.192, lr=lr) for lr in (0.5, 2.0, 4.0) for s in range(3)),
        *(cell("noise", "s", "full", s, 8.192, batch=batch) for batch in (8, 32) for s in range(3)),
        *(cell("noise", "s", "full", 0, 16.384, repeat=r) for r in (1, 2)),
    ]
    rates = [
        cell("rates", "s", v, s, 8.192, lr=lr)
        for s in range(2)
        for v in ("trilinear", "determinant", "sliding")
        for lr in (1.0, 0.5, 2.0, 4.0)
    ]
    ablations = [
        [cell("ablation", "s", v, seed, 16.384) for v in (*EVERY_2ND, *WINDOWS, *TREATMENTS, *SQUARED_RELU)]
        for seed in range(2)
    ]
    long = [
        cell("length", size, v, seed, tokens)
        for seed in range(3)
        for size, tokens in (("s", 8.192), ("s", 32.768), ("xs", 32.768), ("m", 8.192), ("m", 32.768))
        for v in ("full", "trilinear", "determinant", "sliding")
    ]
    return _once([*core[0], *noise, *rates, *core[1], *core[2], *ablations[0], *ablations[1], *long])


def speed() -> list[Cell]:
    """Short runs, to be timed alone on the device; after the study, whose compiled kernels are then at hand."""
    variants = ("full", "sliding", "trilinear", "determinant", "deeper")
    return [
        Cell(group="speed", size=size, variant=v, seed=0, steps=48) for size in ("l", "m", "s", "xs") for v in variants
    ]


def toy() -> list[Cell]:
    """A study of minutes on a CPU, to try the script."""
    variants = ("full", "trilinear", "determinant, scale d^-3/2", "2:4, down lr 0.1", "deeper")
    short = {"steps": 6, "batch": 2, "seq_len": 64}
    return [Cell(group="core", size="toy", variant=v, seed=0, tasks=v == "full", **short) for v in variants]


def _once(cells: list[Cell]) -> list[Cell]:
    """Without the cells whose run another group has already."""
    seen, kept = set(), []
    for cell in cells:
        key = dataclasses.replace(cell, group="", tasks=False)
        if key not in seen:
            seen.add(key)
            kept.append(cell)
    return kept


def cost(cell: Cell) -> float:
    """Seconds that a cell takes of an H200, a rough guess made before the first run."""
    config = recipe(cell).config
    tokens = cell.steps * cell.batch * cell.seq_len
    return tokens * (train_flops_per_token(config, cell.seq_len) / 250e12 + 1e-7 + 1.5e-8 * config.num_hidden_layers)

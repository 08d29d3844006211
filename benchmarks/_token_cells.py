"""The runs of the study of token efficiency: which models, how long, which seeds, and in which order.

A cell is one model of one recipe, trained with several seeds at once (`_token_seeds.py`) and looked at after several
lengths; each seed and length gives one row of results. Variants of one size have equal parameters (the feed-forward
width makes up for k2_proj and v2_proj) unless the name says otherwise; rows of one seed have read the same tokens in
the same order. The order of the list is the order in which cells start.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidlm.models.config import SidConfig
from sidlm.models.flops import num_parameters, train_flops_per_token

SIZES: dict[str, dict[str, Any]] = {
    "xs": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 344},
    "s": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 512},
    "m": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 704},
    "l": {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "ff": 1024},
    "nano": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "ff": 176,
        "head_dim": 32,
    },
    "toy": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "ff": 64},
}
"""About 0.9M, 1.6M, 2.8M and 5.7M parameters without embeddings; "nano" is for a CPU,
"toy" tries the script out."""
LR = {"toy": 4e-3, "nano": 8e-3, "xs": 6e-3, "s": 5e-3, "m": 4e-3, "l": 3.3e-3}
"""Base learning rate: about 4e-3 at width 256, and as 1/sqrt(width)."""

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
    "determinant (64,8)": {"mixer": "simplicial_attention", "simplicial_window": [64, 8]} | DETERMINANT,
    "determinant (32,4)": {"mixer": "simplicial_attention", "simplicial_window": [32, 4]} | DETERMINANT,
    "trilinear (32,4)": {"mixer": "simplicial_attention", "simplicial_window": [32, 4]},
    "determinant (16,8)": {"mixer": "simplicial_attention", "simplicial_window": [16, 8]} | DETERMINANT,
    "determinant (16,16)": {"mixer": "simplicial_attention", "simplicial_window": [16, 16]} | DETERMINANT,
    "determinant (64,8) every 2nd": {
        "mixer": "simplicial_attention", "simplicial_window": [64, 8], "every": 2,
    } | DETERMINANT,
    "determinant (32,4) every 2nd": {
        "mixer": "simplicial_attention", "simplicial_window": [32, 4], "every": 2,
    } | DETERMINANT,
    "determinant (32,4) first": {
        "mixer": "simplicial_attention", "simplicial_window": [32, 4], "places": (0,),
    } | DETERMINANT,
    "determinant (32,4) first two": {
        "mixer": "simplicial_attention", "simplicial_window": [32, 4], "places": (0, 1),
    } | DETERMINANT,
    "determinant (32,4) but for the last": {
        "mixer": "simplicial_attention", "simplicial_window": [32, 4], "places": (0, 1, 2),
    } | DETERMINANT,
    "trilinear (32,4) first": {"mixer": "simplicial_attention", "simplicial_window": [32, 4], "places": (0,)},
    "sliding 32": {"mixer": "sliding_attention", "sliding_window": 32},
    "sliding 64": {"mixer": "sliding_attention", "sliding_window": 64},
    "sliding 32 every 2nd": {"mixer": "sliding_attention", "sliding_window": 32, "every": 2},
    "sliding 32 first": {"mixer": "sliding_attention", "sliding_window": 32, "places": (0,)},
    "sliding 32 first two": {"mixer": "sliding_attention", "sliding_window": 32, "places": (0, 1)},
    "sliding 32 but for the last": {"mixer": "sliding_attention", "sliding_window": 32, "places": (0, 1, 2)},
    "sliding 512": {"mixer": "sliding_attention", "sliding_window": 512},
    "trilinear, no norm": {"mixer": "simplicial_attention", "simplicial_qk_norm": False},
    "trilinear, no positions": {"mixer": "simplicial_attention", "simplicial_position": "none"},
    "trilinear, biases 0": {
        "mixer": "simplicial_attention", "simplicial_k2_bias": 0.0, "simplicial_v2_bias": 0.0,
    },
    "trilinear, biases 0, 1": {"mixer": "simplicial_attention", "simplicial_k2_bias": 0.0},
    "trilinear, scale d^-3/2": {"mixer": "simplicial_attention", "simplicial_scale": "d^-3/2"},
    "trilinear, no norm, scale d^-3/2": {
        "mixer": "simplicial_attention", "simplicial_qk_norm": False, "simplicial_scale": "d^-3/2",
    },
    "determinant, no norm": {"mixer": "simplicial_attention", "simplicial_qk_norm": False} | DETERMINANT,
    "determinant, RoPE": {"mixer": "simplicial_attention"} | DETERMINANT | {"simplicial_position": "rope"},
    "determinant, v2 bias 0": {"mixer": "simplicial_attention", "simplicial_v2_bias": 0.0} | DETERMINANT,
    "determinant, scale d^-3/2": {"mixer": "simplicial_attention", "simplicial_scale": "d^-3/2"} | DETERMINANT,
    "squared ReLU": {"mlp_type": "squared_relu"},
    "squared ReLU, down lr 0.1": {"mlp_type": "squared_relu", "down_lr": 0.1},
    "2:4": {"mlp_type": "squared_relu", "mlp_sparsity": "2:4"},
}  # fmt: skip
"""Name -> fields of the model that differ from full attention with SwiGLU; `mixer` stands in every 4th layer, or in the
layers `places`, counted from 0."""
CORE = ("full", "sliding", "trilinear", "determinant", "deeper")
CHEAP = ("determinant (32,4)", "determinant (64,8)", "sliding 32")
"""Tiny windows, and what they are compared with."""
SEARCH = tuple(v for v in VARIANTS if "(64,8)" in v or "(32,4)" in v or "(16," in v)
"""2-simplicial variants that cost at most 1.1 times the FLOPs of full attention; the best goes on with other seeds."""
SEARCH_CONTROLS = tuple(v for v in VARIANTS if v.startswith(("sliding 32", "sliding 64")))
BEST = "best"
"""In a plan: the variant of SEARCH that was best at equal FLOPs."""
WINDOWS = ("trilinear (128,8)", "trilinear (256,16)", "sliding 512", "trilinear (512,32)")
TREATMENTS = tuple(v for v in VARIANTS if v.startswith(("trilinear,", "determinant,")))
EVERY_2ND = ("sliding every 2nd", "trilinear every 2nd", "determinant every 2nd")
SQUARED_RELU = tuple(v for v in VARIANTS if v.startswith(("squared", "2:4")))

MILLION = 1_048_576
VOCABULARY = 4096
SEQ_LEN = 1024
BATCH = 8
DECAY = 0.2
"""Share of a run in which the learning rate falls to zero."""
LENGTHS = (1, 2, 4, 8)
"""Millions of tokens."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that are trained together. lr is a factor of the size's base rate; lengths in steps; tasks: whether answers
    of tasks are scored at the last length."""

    group: str
    size: str
    variant: str
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    batch: int = BATCH
    seq_len: int = SEQ_LEN
    lr: float = 1.0
    tasks: bool = False
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} seeds {','.join(map(str, self.seeds))} to {self.lengths[-1]}"

    @property
    def kind(self) -> str:
        repeat = f" run {self.repeat}" if self.repeat else ""
        return f"{self.size} {self.variant} b{self.batch} lr{self.lr:g}{repeat}"

    def row_name(self, seed: int, steps: int) -> str:
        return f"{self.kind} seed {seed} steps {steps}"

    @property
    def row_names(self) -> list[str]:
        return [self.row_name(seed, steps) for steps in self.lengths for seed in self.seeds]

    @property
    def steps_in_all(self) -> int:
        """Steps done for all lengths: the longest, and the decays of the others."""
        return self.lengths[-1] + sum(round(DECAY * steps) for steps in self.lengths[:-1])


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
    base = {"head_dim": 64} | shape | {
        "vocab_size": vocab, "max_position_embeddings": 2048, "mlp_type": "swiglu",
        "intermediate_size": width, "layer_types": ["full_attention"] * shape["num_hidden_layers"],
    }  # fmt: skip
    lr = LR[cell.size] * cell.lr * spec.pop("lr_factor", 1.0)
    down_lr = spec.pop("down_lr", 1.0)
    fields = _deeper(base, cell.seq_len) if spec.pop("deeper", False) else _changed(base, spec)
    return Recipe(SidConfig(**fields), fields, lr, down_lr)


def _changed(base: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant with as many parameters as `base`, to a multiple of 8 of the feed-forward width."""
    spec = dict(spec)
    mixer, every, layers = spec.pop("mixer", "full_attention"), spec.pop("every", 4), base["num_hidden_layers"]
    places = spec.pop("places", range(every - 1, layers, every))
    if "simplicial_scale" in spec:
        spec["simplicial_scale"] = base["head_dim"] ** -1.5
    types = [mixer if i in places else "full_attention" for i in range(layers)]
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

    def cell(
        group: str, size: str, variant: str, seeds: Sequence[int], lengths: Sequence[float], **others: Any
    ) -> Cell:
        tokens = others.get("batch", BATCH) * SEQ_LEN
        steps = tuple(max(10 * (i + 1), round(n * million / tokens)) for i, n in enumerate(lengths))
        return Cell(group=group, size=size, variant=variant, seeds=tuple(seeds), lengths=steps, **others)

    four, fresh, sizes, pair = (0, 1, 2, 3), (4, 5, 6, 7), ("xs", "s", "m", "l"), ("l", "m")
    core = {v: {s: cell("core", s, v, four, LENGTHS, tasks=True) for s in sizes} for v in CORE}
    short = {v: [cell("core", s, v, four, LENGTHS[:3], tasks=True) for s in sizes] for v in CORE}
    cheap = {s: [cell("cheap", s, v, four, LENGTHS[:3], tasks=True) for v in CHEAP] for s in pair}
    search = [cell("search", "s", v, four, LENGTHS[:2]) for v in (*SEARCH, *SEARCH_CONTROLS)]
    again = [
        cell("fresh seeds", s, v, fresh, LENGTHS[:3], tasks=True)
        for s in pair
        for v in (BEST, "full", "sliding 32", "sliding")
    ]
    ablations = [
        cell("ablation", "s", v, four, LENGTHS[1:2])
        for v in (*EVERY_2ND, *WINDOWS[:-1], *TREATMENTS, *SQUARED_RELU[:-1], *WINDOWS[-1:])
    ]
    sparse = [cell("ablation", "s", SQUARED_RELU[-1], [seed], LENGTHS[1:2]) for seed in four]
    rates = [
        cell("rates", "s", v, four, LENGTHS[1:2], lr=lr)
        for lr in (2.0, 0.5)
        for v in ("determinant", "trilinear", "sliding")
    ]
    noise = [
        *(cell("noise", "s", "full", four, LENGTHS[:3], lr=lr) for lr in (2.0, 0.5)),
        *(cell("noise", "s", "full", four, LENGTHS[:3], batch=batch) for batch in (4, 16)),
    ]
    longer = [cell("longer", "m", v, four, (16,), tasks=True) for v in ("full", "sliding", BEST, "determinant")]
    small = [cell for v in ("determinant", "trilinear", "full", "sliding") for cell in short[v]]
    large = [core[v][s] for v in CORE for s in sizes]
    return [
        cell("noise", "s", "full", four, LENGTHS[:2], repeat=1), *cheap["l"], *small, *cheap["m"], *short["deeper"],
        *ablations, *sparse, *search, *again, *rates, *large, *longer, *noise,
    ]  # fmt: skip


def toy() -> list[Cell]:
    """A study of minutes on a CPU, to try the script."""
    variants = ("full", "determinant (64,8)", "determinant (32,4) first", "2:4", "deeper", BEST)
    short = {"lengths": (6, 10), "batch": 2, "seq_len": 64}
    seeds = [(0,) if v == "2:4" else (4, 5) if v == BEST else (0, 1) for v in variants]
    return [
        Cell(group="search", size="toy", variant=v, seeds=s, tasks=v == "full", **short)
        for v, s in zip(variants, seeds, strict=True)
    ]


def best(rows: list[dict[str, Any]], size: str, batch: int) -> str | None:
    """The variant of SEARCH with the least loss beside full attention of as many FLOPs, after the longest length that
    several have reached at the size; None before that."""
    from _token_statistics import at_equal_flops

    here = [r for r in rows if (r["size"], r["lr"], r["batch"], r["repeat"]) == (size, 1, batch, 0)]
    known = {v: {r["tokens"] for r in here if r["variant"] == v} for v in SEARCH}
    reached = [n for n in {n for tokens in known.values() for n in tokens} if sum(n in x for x in known.values()) > 1]
    found = {v: at_equal_flops(here, v, "full", size, max(reached)) for v in SEARCH if reached}
    means = {v: sum(d) / len(d) for v, d in found.items() if d}
    return min(means, key=lambda v: means[v]) if means else None


@functools.cache
def cost(cell: Cell) -> float:
    """Seconds that a cell takes of an H200, from the second study: most of a step is memory traffic and short kernels,
    whatever the width, and the portable 2-simplicial kernels reach 35 TFLOP/s."""
    made = recipe(replace(cell, variant=SEARCH[0]) if cell.variant == BEST else cell)
    rest = SidConfig(**made.fields | {"layer_types": ["full_attention"] * made.config.num_hidden_layers})
    plain = train_flops_per_token(rest, cell.seq_len)
    pairs = max(0.0, train_flops_per_token(made.config, cell.seq_len) - plain)
    tokens = cell.steps_in_all * cell.batch * cell.seq_len * len(cell.seeds)
    layers = 0.4 + 0.15 * made.config.num_hidden_layers
    return tokens * (layers * 1.8e-7 + plain / 390e12 + pairs / 35e12)

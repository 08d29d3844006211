"""What is compared with what in the study of token efficiency: sizes, lengths, pairs, equal FLOPs, local exponents."""

from __future__ import annotations

import math
from typing import Any

from _token_statistics import Mean, Row, at_equal_flops, by_length, common_spread, differences, pooled

SIZES = ("xs", "s", "m", "l")
CORE = ("full", "sliding", "trilinear", "determinant", "deeper")
Groups = list[list[float]]
Ablation = tuple[str, dict[str, Mean | None], float]


def standard(rows: list[Row]) -> list[Row]:
    """Rows of the base rate and batch, no repeats, of the variants that are compared everywhere."""
    return [r for r in rows if r["lr"] == 1 and r["batch"] == 8 and not r["repeat"] and r["variant"] in CORE]


def lengths(rows: list[Row]) -> list[int]:
    return sorted({row["tokens"] for row in rows})


def compared(rows: list[Row], tokens: int) -> list[Row]:
    """Rows of a length at the sizes where all mixers ran, or at all sizes where 2-simplicial ones ran nowhere."""
    here = of(rows, tokens=tokens)
    sizes = [s for s in SIZES if all(of(here, size=s, variant=v) for v in CORE[:4])]
    return [row for row in here if row["size"] in sizes] if sizes else here


def main_length(rows: list[Row]) -> int:
    """The longest length at which all mixers ran."""
    return max(n for n in lengths(rows) if all(of(rows, tokens=n, variant=v) for v in CORE[:4]))


def of(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def by_size(rows: list[Row], variant: str, base: str, value: Any = lambda row: row["loss"]) -> Groups:
    return [differences(of(rows, size=size), variant, base, value) for size in SIZES]


def pairs_spread(rows: list[Row], value: Any = lambda row: row["loss"]) -> tuple[float, int]:
    """One spread for differences within pairs, of all sizes and variants: few seeds tell little about each."""
    return common_spread([g for v in CORE[1:] for g in by_size(rows, v, "full", value) if g])


def paired(groups: Groups, spread: tuple[float, int]) -> Mean | None:
    """`pooled`, or None without a pair."""
    return pooled(groups, *spread) if any(groups) else None


def comparisons(rows: list[Row]) -> dict[tuple[str, str, int], Mean]:
    """(variant, against what, tokens) -> mean of the difference over the sizes that are compared at the length; "full,
    equal FLOPs" is one of the bases."""
    found = {}
    for tokens in lengths(rows):
        here = compared(rows, tokens)
        spread = pairs_spread(of(rows, tokens=tokens))
        sizes = {row["size"] for row in here}
        for variant in CORE[1:]:
            for base in ("full", "sliding", "deeper"):
                m = paired(by_size(here, variant, base), spread) if variant != base else None
                if m is not None:
                    found[variant, base, tokens] = m
            m = paired([at_equal_flops(rows, variant, "full", size, tokens) for size in sizes], spread)
            if m is not None:
                found[variant, "full, equal FLOPs", tokens] = m
    return found


def slopes(
    rows: list[Row], variant: str, kind: str, where: str, low: float, high: float, last: int
) -> dict[int, float]:
    if kind == "D":
        curves = by_length(rows, where, variant)
        known = {s: c for s, c in curves.items() if low in c and high in c}
        return {s: math.log(c[int(low)] / c[int(high)]) / math.log(high / low) for s, c in known.items()}
    small, large = (of(rows, size=s, variant=variant, tokens=last) for s in where.split(" to "))
    one, other = ({row["seed"]: row for row in part} for part in (small, large))
    n = "params_non_embedding"
    return {
        s: math.log(one[s]["loss"] / other[s]["loss"]) / math.log(other[s][n] / one[s][n]) for s in one if s in other
    }


def ablations(rows: list[Row]) -> list[Ablation]:
    """(variant, differences, FLOPs beside full) at s, at the length of the ablations, least first."""
    tokens = max((row["tokens"] for row in rows if row["group"] == "ablation"), default=0)
    every = of(rows, size="s", lr=1, batch=8, repeat=0)
    here = [row for row in every if row["tokens"] == tokens and row["seed"] < 4]
    names = [v for v in dict.fromkeys(row["variant"] for row in here) if v != "full"]
    spread = common_spread([g for v in names if (g := differences(here, v, "full"))])
    full, found = of(here, variant="full"), []
    for variant in names:
        to = {b: paired([differences(here, variant, b)], spread) for b in ("full", "sliding") if b != variant}
        to["equal FLOPs"] = paired([at_equal_flops(every, variant, "full", "s", tokens)], spread)
        if to["full"] is not None:
            found.append((variant, to, of(here, variant=variant)[0]["flops"] / full[0]["flops"]))
    return sorted(found, key=lambda x: x[1]["full"].value if x[1]["full"] else 0.0)


def millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M"

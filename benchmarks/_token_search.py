"""Tables of the search for a gain at equal FLOPs: many variants at one size, the chosen ones at others, fresh seeds."""

from __future__ import annotations

import statistics
from typing import Any

from _token_compare import millions, of, paired, slopes
from _token_statistics import (
    Mean,
    Row,
    at_equal_flops,
    common_spread,
    differences,
    mean,
    slope,
    tokens_saved,
)

FIRST, FRESH = (0, 1, 2, 3), (4, 5, 6, 7)
"""Seeds of the search, and those that only what it found, and its controls, were trained with."""
BASES = ("full", "sliding", "sliding 32")


def plain(rows: list[Row]) -> list[Row]:
    """Rows of the base rate and batch, no repeats."""
    return of(rows, lr=1, batch=8, repeat=0)


def spread_of(rows: list[Row], size: str, tokens: int) -> tuple[float, int]:
    """One spread of paired differences from full attention for all variants at a size and length."""
    here = of(rows, size=size, tokens=tokens)
    names = {row["variant"] for row in here} - {"full"}
    return common_spread([g for v in sorted(names) if (g := differences(here, v, "full"))])


def against(rows: list[Row], variant: str, base: str, size: str, tokens: int) -> tuple[Mean | None, Mean | None]:
    """(at equal tokens, at equal FLOPs): loss of a variant minus that of the base, over the pairs there are."""
    if variant == base:
        return None, None
    spread = spread_of(rows, size, tokens)
    here = of(rows, size=size, tokens=tokens)
    same = paired([differences(here, variant, base)], spread)
    return same, paired([at_equal_flops(rows, variant, base, size, tokens)], spread)


def relative_cost(rows: list[Row], variant: str, size: str) -> float:
    cost = {row["variant"]: row["flops"] / row["tokens"] for row in of(rows, size=size)}
    return cost[variant] / cost["full"]


def everything(rows: list[Row], size: str, tokens: int) -> list[dict[str, Any]]:
    """Every variant at a size and length with the first seeds, best at equal FLOPs first."""
    rows = [row for row in plain(rows) if row["seed"] in FIRST]
    names = list(dict.fromkeys(row["variant"] for row in of(rows, size=size, tokens=tokens)))
    found = []
    for variant in names:
        to = {base: against(rows, variant, base, size, tokens) for base in BASES}
        losses = [row["loss"] for row in of(rows, size=size, tokens=tokens, variant=variant)]
        found.append({"variant": variant, "to": to, "cost": relative_cost(rows, variant, size),
                      "loss": statistics.mean(losses), "seeds": len(losses)})  # fmt: skip
    return sorted(found, key=lambda x: x["to"]["full"][1].value if x["to"]["full"][1] else 0.0)


def search_lines(rows: list[Row], size: str, tokens: int) -> list[list[str]]:
    return [
        [x["variant"], f"{x['cost']:.3f}", f"{x['loss']:.4f} ({x['seeds']})",
         *(str(m or "") for base in BASES[:2] for m in x["to"][base])]
        for x in everything(rows, size, tokens)
    ]  # fmt: skip


SEARCH_HEAD = [
    "variant", "FLOPs", "loss (seeds)", "minus full", "the same, equal FLOPs", "minus sliding",
    "the same, equal FLOPs",
]  # fmt: skip


def chosen_lines(rows: list[Row]) -> list[list[str]]:
    """What was trained at m and l with tiny windows, by length and set of seeds."""
    rows, body = plain(rows), []
    sets = {"0 to 3": FIRST, "4 to 7": FRESH, "all": FIRST + FRESH}
    wanted = {row["variant"] for row in rows if row["group"] in ("cheap", "fresh seeds", "longer")} - {"full"}
    for size in ("s", "m", "l"):
        for variant in sorted(wanted):
            for tokens in sorted({row["tokens"] for row in of(rows, size=size, variant=variant)}):
                for name, seeds in sets.items():
                    own = [row for row in rows if row["seed"] in seeds]
                    pairs = {base: against(own, variant, base, size, tokens) for base in BASES}
                    if of(own, size=size, variant=variant, tokens=tokens) and any(m for p in pairs.values() for m in p):
                        body.append([size, variant, f"{relative_cost(rows, variant, size):.3f}", millions(tokens), name,
                                     *(str(m or "") for base in BASES for m in pairs[base])])  # fmt: skip
    return body


CHOSEN_HEAD = [
    "size", "variant", "FLOPs", "tokens", "seeds", *(x for b in BASES for x in (f"minus {b}", "equal FLOPs")),
]  # fmt: skip


def saved_lines(rows: list[Row], variant: str, base: str) -> list[list[str]]:
    """Tokens and FLOPs that a variant needs less for the loss of the base, by size and length, first seeds."""
    rows, body = [row for row in plain(rows) if row["seed"] in FIRST], []
    for size in ("s", "m", "l"):
        steep = slope(rows, size, base)
        for tokens in sorted({row["tokens"] for row in of(rows, size=size, variant=variant)}):
            pair = against(rows, variant, base, size, tokens)
            if steep is not None and all(pair):
                shares = ["{:+.1%} ({:+.1%} to {:+.1%})".format(*tokens_saved(m, steep)) for m in pair if m]
                body.append([variant, base, size, millions(tokens), *(str(m) for m in pair), *shares])
    return body


SAVED_HEAD = ["variant", "against", "size", "tokens", "loss", "loss, equal FLOPs", "tokens saved", "FLOPs saved"]


def part_lines(rows: list[Row], name: str, field: str, tokens: int) -> list[list[str]]:
    """Differences by domain or task at m and l, equal tokens, first seeds, mean of the two sizes."""
    pairs = [("sliding 32", "full"), ("determinant (32,4)", "full"), ("determinant (32,4)", "sliding 32")]
    here = [row for row in of(plain(rows), tokens=tokens) if row["seed"] in FIRST and row.get(name)]
    body = []
    for part in sorted({k for row in here for k in row[name]}):
        groups = {
            pair: [differences(of(here, size=s), *pair, lambda r, p=part: r[name][p][field]) for s in ("m", "l")]
            for pair in pairs
        }
        spread = common_spread([g for found in groups.values() for g in found if g])
        body.append([part, *(str(paired(groups[pair], spread) or "") for pair in pairs)])
    return body


PART_HEAD = ["sliding 32 minus full", "determinant (32,4) minus full", "determinant (32,4) minus sliding 32"]


def slope_lines(rows: list[Row], low: int, high: int) -> list[list[str]]:
    """Local exponents of tokens of tiny windows, and what they differ from full's and from sliding 32's."""
    rows, body = [row for row in plain(rows) if row["seed"] in FIRST], []
    for size in ("m", "l"):
        every = {
            v: slopes(rows, v, "D", size, low, high, 0) for v in (*BASES, "determinant (64,8)", "determinant (32,4)")
        }
        for variant, own in every.items():
            gaps = [
                [own[s] - every[b][s] for s in sorted(own.keys() & every[b].keys())] for b in ("full", "sliding 32")
            ]
            told = [str(mean(g)) if len(g) > 1 and any(g) else "" for g in gaps]
            body.append([size, variant, f"{mean(list(own.values())).value:.4f}", *told])
    return body


SLOPE_HEAD = ["size", "variant", "exponent of tokens", "minus full's", "minus sliding 32's"]

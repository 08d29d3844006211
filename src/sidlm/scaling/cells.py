"""Tables of finished runs: CSV or JSON lines with at least variant, params, tokens, seed and loss."""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidlm.errors import SidError
from sidlm.scaling.law import Floats, Ints

# losses that differ in one of these are no measurements of one thing
SAME = {"tokenizer": "tokenizers", "tokenizer_hash": "tokenizers", "held_out": "held-out texts"}
SAME_IN_VARIANT = {"data": "training data", "data_hash": "training data"}


@dataclass(frozen=True)
class Cells:
    """The runs of one variant: arrays (n,) of floats, nan where a column is absent.

    pair: the place of a run in the grid (rank of its size, rank of its tokens); cells of two variants with the same
    pair and seed are a pair.
    """

    variant: str
    params: Floats
    tokens: Floats
    seed: Ints
    loss: Floats
    flops: Floats
    seconds: Floats
    pair: Ints

    @property
    def points(self) -> int:
        """Distinct (params, tokens)."""
        return len(set(self.pair.tolist()))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .csv file, or of JSON lines. Raises SidError naming file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SidError(f"cannot read cells {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SidError(f"cells {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise SidError(f"cells {path} is empty: expected a line for each run")
    if not lines[0][1].lstrip().startswith("{"):
        return _csv_rows(path, text)
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SidError(f"{path}, line {number}: not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise SidError(f"{path}, line {number}: expected an object, got {line.strip()[:40]}")
        rows.append(row | {"where": f"{path}, line {number}"})
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    rows = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise SidError(f"{where}: expected {len(reader.fieldnames)} values: {', '.join(reader.fieldnames)}")
        rows.append(row | {"where": where})
    if not rows:
        raise SidError(f"cells {path} has a header and no rows")
    return rows


def value_of(row: dict[str, Any], column: str) -> Any:
    """A column, which may lie deeper: tasks.gsm8k.nll_per_token. None if it is absent."""
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def numbers(row: dict[str, Any], column: str, *, positive: bool = True) -> float:
    """A required number of a row. Raises SidError naming the line, the column and what is there."""
    value = value_of(row, column)
    if value is None and row.get("error"):
        raise SidError(f"{row['where']}: cell {row.get('name', '')} has no {column}: {row['error']}")
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        kind = "a number above 0" if positive else "a number"
        raise SidError(f"{row['where']}: {column} is {value!r}, expected {kind}{_label(row)}")
    return number


def _label(row: dict[str, Any]) -> str:
    known = [f"{key} {row[key]}" for key in ("variant", "params", "tokens", "seed") if key in row]
    return f" ({', '.join(known)})" if known else ""


def require_columns(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> None:
    """Raise SidError for the first column that no row has, naming those there are and the nearest."""
    known = list(dict.fromkeys(key for row in rows for key in row if key != "where"))
    for column in columns:
        if all(value_of(row, column) is None for row in rows) and not any(row.get("error") for row in rows):
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SidError(f"{_file(rows)}: no column {column!r}, there are {', '.join(known)}{hint}")


def _file(rows: Sequence[dict[str, Any]]) -> str:
    return str(rows[0]["where"]).rpartition(", line ")[0]


def read_cells(path: str | Path, *, params: str = "params", loss: str = "loss") -> list[Cells]:
    """The variants of a table, in the order of the file.

    params, loss: the columns to take for N and L (of JSON lines also deeper ones, domains.code). Raises SidError, in
    one line that says what is missing, for absent columns, losses that are no number, failed cells, a variant that
    lacks a seed somewhere, a run given twice, and rows of different tokenizers or held-out texts (in a variant: data).
    """
    rows = read_rows(path)
    require_columns(rows, ("variant", params, "tokens", "seed", loss))
    _refuse_mixtures(rows, SAME)
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if value_of(row, "variant") in (None, ""):
            raise SidError(f"{row['where']}: no variant")
        by_variant[str(row["variant"])].append(row)
    for own in by_variant.values():
        _refuse_mixtures(own, SAME_IN_VARIANT)
    found = [_variant(name, own, params, loss) for name, own in by_variant.items()]
    _refuse_missing_seeds(found, str(path))
    return found


def _variant(name: str, rows: list[dict[str, Any]], params: str, loss: str) -> Cells:
    n = np.array([numbers(row, params) for row in rows])
    d = np.array([numbers(row, "tokens") for row in rows])
    seed = np.array([int(numbers(row, "seed", positive=False)) for row in rows])
    measured = np.array([numbers(row, loss) for row in rows])
    size_rank = np.unique(n, return_inverse=True)[1]
    tokens_rank = np.zeros(len(rows), np.int64)
    for size in range(size_rank.max() + 1):
        here = size_rank == size
        tokens_rank[here] = np.unique(d[here], return_inverse=True)[1]
    taken: dict[tuple[float, float, int], str] = {}
    for row, *key in zip(rows, n, d, seed, strict=True):
        other = taken.setdefault((key[0], key[1], key[2]), row["where"])
        if other != row["where"]:
            raise SidError(f"{row['where']}: the run of {other} again{_label(row)}")
    return Cells(
        name, n, d, seed, measured, _optional(rows, ("flops",)), _seconds(rows, d), size_rank * 100_000 + tokens_rank
    )


def _optional(rows: list[dict[str, Any]], columns: Sequence[str]) -> Floats:
    """A column of numbers; nan in all rows unless every row has it."""
    column = next((c for c in columns if all(value_of(row, c) not in (None, "") for row in rows)), None)
    return np.full(len(rows), np.nan) if column is None else np.array([numbers(row, column) for row in rows])


def _seconds(rows: list[dict[str, Any]], tokens: Floats) -> Floats:
    """Seconds of training at the median step's speed where that is known, else as measured in all."""
    speed = _optional(rows, ("tokens_per_second",))
    return tokens / speed if np.isfinite(speed).all() else _optional(rows, ("wall_seconds", "seconds"))


def _refuse_mixtures(rows: list[dict[str, Any]], same: dict[str, str]) -> None:
    for column, words in same.items():
        seen: dict[str, str] = {}
        for row in rows:
            value = value_of(row, column)
            if value not in (None, ""):
                seen.setdefault(str(value), row["where"])
        if len(seen) > 1:
            (one, where), (other, there) = list(seen.items())[:2]
            raise SidError(
                f"losses of {len(seen)} {words} cannot be compared: {column} is {one[:16]} in {where} and "
                f"{other[:16]} in {there}"
            )


def _refuse_missing_seeds(found: list[Cells], path: str) -> None:
    seeds = sorted({int(seed) for cells in found for seed in cells.seed})
    for cells in found:
        for pair in dict.fromkeys(cells.pair.tolist()):
            here = cells.pair == pair
            missing = [seed for seed in seeds if seed not in cells.seed[here]]
            if missing:
                raise SidError(
                    f"{path}: variant {cells.variant} has no run of seed {', '.join(map(str, missing))} at params "
                    f"{cells.params[here][0]:.6g}, tokens {cells.tokens[here][0]:.6g}; other cells have seeds "
                    f"{', '.join(map(str, seeds))}"
                )


def require_points(cells: Cells) -> None:
    """Raise SidError unless the variant's runs can determine the five numbers of a law."""
    sizes, budgets = len(np.unique(cells.params)), len(np.unique(cells.tokens))
    if sizes < 3 or budgets < 3 or cells.points < 6:
        raise SidError(
            f"too few cells to fit variant {cells.variant}: {cells.points} points (params, tokens) of {sizes} sizes "
            f"and {budgets} token budgets; five unknowns need at least 6 points of 3 sizes and 3 budgets"
        )

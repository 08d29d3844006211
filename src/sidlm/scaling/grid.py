"""A grid of training runs: sizes x budgets x variants x seeds, read from one YAML file.

    base: configs/nano.yaml        # optional: the config of every cell, a file of `sid train`
    settings: {optim.lr: 2e-3}     # optional: changes to it
    variants:                      # what is compared: changes to the config, sections or dotted keys
      llama: {model.arch: llama}
      sid: {model.arch: sid}
    sizes:
      small: {model.overrides: {hidden_size: 64}}
      large: {model.overrides: {hidden_size: 128}}
    tokens: [1e6, 4e6]             # or `flops`: training FLOPs, from which each cell's tokens follow
    seeds: [0, 1, 2]
    tasks: {arc: arc.jsonl}        # optional: question files whose answers' likelihood is measured at the end

Later changes win: base, settings, size, variant, then what `sizes` inside a variant says for that size.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.errors import SidError
from sidlm.train.config import RunConfig, check, load_config
from sidlm.train.settings import apply_settings, argv_settings, mapping_settings, nearest, read_yaml

if TYPE_CHECKING:
    from sidlm.models.config import SidConfig

KEYS = ("base", "settings", "variants", "sizes", "tokens", "flops", "seeds", "tasks")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a grid. Its name, VARIANT/SIZE/BUDGET-sSEED, is that of its folder in the grid's."""

    name: str
    variant: str
    size: str
    seed: int
    tokens: int
    """tokens it trains on: optimizer steps x rows x row length, so not exactly those asked for"""
    params: int
    params_non_embedding: int
    flops_per_token: float
    """forward and backward (models/flops.py)"""
    cfg: RunConfig
    tasks: dict[str, str]

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token


def read_grid(path: str | Path, out: str | Path, argv: Sequence[str] = ()) -> list[Cell]:
    """The cells of a grid file, whose run folders lie in `out`, changed by `--dotted.key value ...` settings.

    Raises SidError naming the file and the key for anything that cannot run.
    """
    grid, where = read_yaml(path, "grid"), f"{path}: "
    unknown = next((key for key in grid if key not in KEYS), None)
    if unknown is not None:
        raise SidError(
            f"{where}unknown key {unknown!r}{nearest(str(unknown), KEYS) or '; there are ' + ', '.join(KEYS)}"
        )
    base = _base_config(grid.get("base"), Path(path), where)
    base = _changed(base, grid.get("settings") or {}, f"{where}settings: ")
    variants, sizes = (_named(grid, key, where) for key in ("variants", "sizes"))
    seeds = [_count(seed, f"{where}seeds", 0) for seed in _list(grid, "seeds", where)]
    if ("tokens" in grid) == ("flops" in grid):
        raise SidError(f"{where}give either tokens or flops: a list of training budgets")
    budget = "tokens" if "tokens" in grid else "flops"
    budgets = [(_amount(value, f"{where}{budget}"), str(value)) for value in _list(grid, budget, where)]
    tasks = {name: str(file) for name, file in _mapping(grid.get("tasks") or {}, f"{where}tasks").items()}
    shared = argv_settings(RunConfig, argv)
    cells = []
    for variant, changes in variants.items():
        per_size = _mapping(changes.get("sizes") or {}, f"{where}variants: {variant}: sizes")
        stray = next((size for size in per_size if size not in sizes), None)
        if stray is not None:
            raise SidError(f"{where}variants: {variant}: sizes: no size {stray!r}; there are {', '.join(sizes)}")
        own = {key: value for key, value in changes.items() if key != "sizes"}
        for size, shape in sizes.items():
            cfg = _changed(base, shape, f"{where}sizes: {size}: ")
            cfg = _changed(cfg, own, f"{where}variants: {variant}: ")
            cfg = _changed(cfg, per_size.get(size) or {}, f"{where}variants: {variant}: sizes: {size}: ")
            cells += _cells_of(apply_settings(cfg, shared), variant, size, budget, budgets, seeds, tasks, Path(out))
    return sorted(cells, key=lambda cell: (seeds.index(cell.seed), -cell.flops))


def _cells_of(
    cfg: RunConfig, variant: str, size: str, budget: str, budgets: list[tuple[float, str]], seeds: list[int],
    tasks: dict[str, str], out: Path,
) -> Iterator[Cell]:  # fmt: skip
    from sidlm.models.flops import num_parameters, train_flops_per_token

    try:
        model = _model_config(cfg)
    except (ValueError, TypeError) as error:
        raise SidError(f"variant {variant}, size {size}: {' '.join(str(error).split())}") from error
    flops_per_token = train_flops_per_token(model, cfg.data.seq_len)
    for amount, written in budgets:
        tokens = amount if budget == "tokens" else amount / flops_per_token
        per_step = cfg.train.batch_size * cfg.data.seq_len
        steps = max(1, round(tokens / per_step))
        for seed in seeds:
            name = f"{variant}/{size}/{written}-s{seed}"
            train = dataclasses.replace(cfg.train, steps=steps, seed=seed, out=str(out / name))
            one = dataclasses.replace(cfg, train=train)
            try:
                check(one)
                if not one.validation.every:
                    raise SidError("validation.every is 0, but a cell's loss is that of held-out text at its end")
            except SidError as error:
                raise SidError(f"cell {name}: {error}") from error
            yield Cell(
                name=name, variant=variant, size=size, seed=seed, tokens=steps * per_step,
                params=num_parameters(model), params_non_embedding=num_parameters(model, non_embedding=True),
                flops_per_token=flops_per_token, cfg=one, tasks=tasks,
            )  # fmt: skip


def _model_config(cfg: RunConfig) -> SidConfig:
    """The model that a run would build, with the vocabulary that its tokenizer has or is trained to."""
    if cfg.model.init_from:
        from sidlm.models.convert.source import read_config
        from sidlm.train.build import start_folder

        return read_config(start_folder(cfg.model.init_from), cfg.model.overrides)
    from sidlm.models.presets import preset

    vocab_size = cfg.data.vocab_size
    if cfg.data.tokenizer:
        from sidlm.data.tokenizer import Tokenizer

        vocab_size = Tokenizer.load(cfg.data.tokenizer).vocab_size
    settings = {"vocab_size": vocab_size, **cfg.model.overrides}
    return preset(cfg.model.preset, arch=cfg.model.arch, **settings)


def _base_config(name: Any, grid: Path, where: str) -> RunConfig:
    """The config file, looked for beside the grid and then from here."""
    if name is None:
        return RunConfig()
    beside = grid.parent / str(name)
    try:
        return load_config(beside if beside.is_file() else str(name))
    except SidError as error:
        raise SidError(f"{where}base: {error}") from error


def _changed(cfg: RunConfig, changes: Any, where: str) -> RunConfig:
    nested = _nested(_mapping(changes, where.rstrip(": ")), where)
    return apply_settings(cfg, mapping_settings(RunConfig, nested, where), where)


def _nested(changes: dict[Any, Any], where: str) -> dict[str, Any]:
    """{"model.arch": "sid", "model": {"preset": "nano"}} as sections."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, last = str(key).split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
            if not isinstance(inside, dict):
                raise SidError(f"{where}{section!r} is given twice")
        if isinstance(value, dict) and isinstance(inside.get(last), dict):
            inside[last] = inside[last] | value
        elif last in inside:
            raise SidError(f"{where}{key!r} is given twice")
        else:
            inside[last] = copy.deepcopy(value)
    return nested


def _named(grid: dict[str, Any], key: str, where: str) -> dict[str, dict[Any, Any]]:
    """The mapping NAME -> changes under a key. Names become parts of file names."""
    found = _mapping(grid.get(key) or {}, f"{where}{key}")
    if not found:
        raise SidError(f"{where}{key} is missing: a mapping of names to settings")
    for name in found:
        if not _NAME.fullmatch(str(name)):
            raise SidError(f"{where}{key}: {name!r} is no name: letters, digits and ._+-")
    return {str(name): _mapping(changes or {}, f"{where}{key}: {name}") for name, changes in found.items()}


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise SidError(f"{where} is a mapping, got {value!r}")
    return value


def _list(grid: dict[str, Any], key: str, where: str) -> list[Any]:
    found = grid.get(key)
    if not isinstance(found, list) or not found:
        raise SidError(f"{where}{key} is missing or empty: a list, for example {key}: [0, 1, 2]")
    if len(set(map(str, found))) < len(found):
        raise SidError(f"{where}{key}: {found} names a value twice")
    return found


def _count(value: Any, where: str, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SidError(f"{where}: expected whole numbers from {low} up, got {value!r}")
    return value


def _amount(value: Any, where: str) -> float:
    """A positive number; YAML 1.1 takes 1e6 for a word."""
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0):
        raise SidError(f"{where}: expected numbers above 0, got {value!r}")
    return amount

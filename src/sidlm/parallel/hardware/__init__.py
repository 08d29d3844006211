"""What a GPU and the links between GPUs can do: numbers in YAML files beside this one, each with its source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sidlm.errors import SidError

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU in nodes of several; bytes, seconds, FLOP/s, and fractions of a peak that are reached."""

    name: str
    gpus_per_node: float
    memory_bytes: float
    reserved_bytes: float
    """what neither weights nor activations can have"""
    memory_bandwidth: float
    memory_fraction: float
    bf16_flops: float
    fp8_flops: float
    gemm_fraction: float
    """of the bf16 peak, in large matrix products"""
    fp8_gemm_fraction: float
    attention_forward: float
    """of the bf16 peak, as are the next four"""
    attention_backward: float
    simplicial_forward: float
    simplicial_backward: float
    """with 64 query heads for each key/value head"""
    simplicial_backward_grouped: float
    """with few"""
    sparse_ffn_speedup: float
    """times as fast as a dense feed-forward layer, with 2:4 sparsity"""
    multiprocessors: float
    tile_rows: float
    """of the part of a matrix product that one multiprocessor computes"""
    tile_columns: float
    nvlink_bandwidth: float
    """each way, within a node"""
    nvlink_fraction: float
    nvlink_latency: float
    network_bandwidth: float
    """each way and GPU, between nodes"""
    network_fraction: float
    network_latency: float
    overlap_cost: float
    """seconds of computing that a second of communication costs which is hidden behind it"""
    sources: dict[str, str]
    """of every number: where it comes from"""


def known() -> list[str]:
    """Names of the hardware files that come with Sid."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """A file of this folder by its name, or any other by its path, which ends in .yaml.

    Raises SidError for a file that is not there, or a number that is missing, unknown, not positive or without source.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise SidError(f"hardware {name!r} is not known: give one of {', '.join(known())}, or a YAML file like theirs")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SidError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("name"), str):
        raise SidError(f"{path}: expected a mapping with a name and numbers, each {{value: ..., source: ...}}")
    wanted = {field.name for field in dataclasses.fields(Hardware)} - {"name", "sources"}
    for what, keys in (("missing", wanted - set(loaded)), ("not known", set(loaded) - wanted - {"name"})):
        if keys:
            raise SidError(f"{path}: {what}: {', '.join(sorted(map(str, keys)))}")
    entries = {key: _entry(path, key, loaded[key]) for key in sorted(wanted)}
    values = {key: value for key, (value, _) in entries.items()}
    return Hardware(name=loaded["name"], **values, sources={key: source for key, (_, source) in entries.items()})


def _entry(path: Path, key: str, entry: Any) -> tuple[float, str]:
    value, source = (entry.get("value"), entry.get("source")) if isinstance(entry, dict) else (None, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not isinstance(source, str):
        raise SidError(f"{path}: {key} must be {{value: a number above 0, source: where it comes from}}, got {entry!r}")
    return float(value), source

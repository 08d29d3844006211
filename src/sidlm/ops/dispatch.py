"""Which implementation of an op runs for these arguments, and why each other one does not.

Each op folder keeps its implementations in a plain dict ``name -> Implementation`` in order of preference.
``impl=`` names one; the environment variable ``SID_IMPL="simplicial=reference,attention=sdpa"`` names one from outside.
"""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Implementation(NamedTuple):
    run: Callable
    """The implementation; all of an op share one signature."""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run on this device and dtype, in words, or None if it can."""
    emulated: Callable[[torch.device], bool] = lambda device: False
    """Whether it can only be emulated on this device, which takes minutes: then it runs if it is named, never else."""


class Row(NamedTuple):
    op: str
    impl: str
    usable: bool
    reason: str


def override(op: str) -> str | None:
    """The implementation that SID_IMPL names for an op."""
    for item in filter(None, os.environ.get("SID_IMPL", "").split(",")):
        name, _, impl = item.partition("=")
        if not impl:
            raise ValueError(f'SID_IMPL has {item!r}; it takes op=implementation pairs, e.g. "simplicial=reference"')
        if name.strip() == op:
            return impl.strip()
        if name.strip() not in _operations():
            raise ValueError(f"SID_IMPL names {name.strip()!r}; the operations are {', '.join(_operations())}")
    return None


def _operations() -> list[str]:
    from sidlm.ops import IMPLEMENTATIONS
    from sidlm.ops.sparse24.backends import OPS

    return [*IMPLEMENTATIONS, *OPS]


def _known(op: str, impls: Mapping[str, Implementation], asked: str | None) -> str | None:
    if asked is not None and asked not in impls:
        raise ValueError(f"{op}: no implementation {asked!r}; there are {', '.join(impls)}")
    return asked


def choose(
    op: str, impls: Mapping[str, Implementation], impl: str | None, device: torch.device, dtype: torch.dtype
) -> str:
    """Name of the implementation to run: the one asked for, else the first that can without being emulated.

    Raises ValueError naming the op, the implementation and the reason if the one asked for is unknown or cannot run.
    """
    asked = _known(op, impls, impl or override(op))
    if asked is not None:
        reason = impls[asked].why_not(device, dtype)
        if reason:
            raise ValueError(f"{op}: implementation {asked!r} cannot run here: {reason}")
        return asked
    for name, candidate in impls.items():
        if not candidate.emulated(device) and candidate.why_not(device, dtype) is None:
            return name
    reasons = (f"{name}: {x.why_not(device, dtype) or 'only emulated'}" for name, x in impls.items())
    raise ValueError(f"{op}: no implementation for {dtype} on {device.type} ({'; '.join(reasons)})")


def table(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every op x implementation on this machine with the reason it is, or is not, usable (``sid doctor`` prints it)."""
    from sidlm.ops import IMPLEMENTATIONS

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op, impls in IMPLEMENTATIONS.items():
        asked = _known(op, impls, override(op))
        first = asked is None
        for name, candidate in impls.items():
            reason, emulated = candidate.why_not(device, dtype), candidate.emulated(device)
            what = "default" if first and not emulated else "named by SID_IMPL" if name == asked else "on request"
            rows.append(Row(op, name, reason is None, reason or what + ", emulated" * emulated))
            first = first and (reason is not None or emulated)
    return rows

"""``sid doctor``: what this machine can run, and a check that each implementation computes the right numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidlm import __version__
from sidlm.cli.common import Parser, add_device, resolve_device

Result = list[Any]  # an op's output and its gradients, as tensors


def _simplicial(dtype: Any, device: Any, impl: str) -> Result:
    return _simplicial_of((2, 63, 4, 32), 2, (16, 8), dtype, device, impl)


def _hopper(dtype: Any, device: Any, impl: str) -> Result:
    """A problem of those that its own kernels take (``hopper.takes``); others go to the portable ones."""
    return _simplicial_of((1, 150, 16, 64), 1, (64, 8), dtype, device, impl)


def _simplicial_of(
    shape: tuple[int, int, int, int], groups: int, window: tuple[int, int], dtype: Any, device: Any, impl: str
) -> Result:
    """shape: of q."""
    from sidlm.ops import two_simplicial_attention

    batch, steps, _, dim = shape
    q, k, v, k2, v2, weight = _randn([shape, *[(batch, steps, groups, dim)] * 4, shape], dtype, device)
    out = two_simplicial_attention(
        q, k, v, k2, v2, window=window, doc_ids=_documents(batch, steps, device), v2_bias=1.0, impl=impl
    )
    return [out, *_gradients(out, weight, (q, k, v, k2, v2))]


def _simplicial_decode(dtype: Any, device: Any, impl: str) -> Result:
    """Three tokens behind histories of 63 and 9; the reference is the dense operation on what the rings hold."""
    import torch

    from sidlm.ops import two_simplicial_attention, two_simplicial_decode

    inputs = _randn([(2, 3, 4, 32), *[(2, 63, 2, 32)] * 4], dtype, device)
    q, k, v, k2, v2 = (x.detach() for x in inputs)
    settings: dict[str, Any] = {"window": (16, 8), "v2_bias": 1.0, "impl": impl}
    if impl == "reference":
        out: list[Any] = []
        for b, n in enumerate((63, 9)):
            row = (x[b : b + 1, :n] for x in (k, v, k2, v2))
            out.append(two_simplicial_attention(q[b : b + 1], *row, **settings))
        return [torch.cat(out)]
    lengths = torch.tensor([63, 9], device=device)
    # a ring of 63 slots: position p is in slot p
    return [two_simplicial_decode(q, k, v, k2, v2, lengths, **settings)]


def _attention(dtype: Any, device: Any, impl: str) -> Result:
    from sidlm.ops import attention

    q, k, v, weight = _randn([(2, 63, 4, 32), *[(2, 63, 2, 32)] * 2, (2, 63, 4, 32)], dtype, device)
    out = attention(q, k, v, window=16, doc_ids=_documents(2, 63, device), impl=impl)
    return [out, *_gradients(out, weight, (q, k, v))]


def _squared_relu_ffn(dtype: Any, device: Any, impl: str) -> Result:
    """Whole numbers, exact in every dtype: all of them keep the same two of four, ties included."""
    import torch

    from sidlm.ops import squared_relu_ffn

    generator = torch.Generator().manual_seed(0)
    shapes = ((130, 32), (256, 32), (32, 256), (130, 32))
    values = (torch.randint(-1, 2, shape, generator=generator) for shape in shapes)
    x, w_up, w_down, weight = (value.to(device, dtype).requires_grad_() for value in values)
    out = squared_relu_ffn(x, w_up, w_down, sparsity="2:4", impl=impl)
    return [out, *_gradients(out, weight, (x, w_up, w_down))]


CHECKS: dict[str, Callable[[Any, Any, str], Result]] = {
    "simplicial": _simplicial,
    "simplicial=hopper": _hopper,
    "simplicial_decode": _simplicial_decode,
    "attention": _attention,
    "squared_relu_ffn": _squared_relu_ffn,
}
"""Op, or op=implementation where one has a check of its own."""


def _randn(shapes: list[tuple[int, ...]], dtype: Any, device: Any) -> list[Any]:
    """Leaves with the same values on every device and in every dtype, up to rounding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    return [value.to(torch.bfloat16).to(device, dtype).requires_grad_() for value in values]


def _documents(batch: int, length: int, device: Any) -> Any:
    import torch

    starts = torch.zeros(batch, length, dtype=torch.int64)
    starts[:, [20, 41]] = 1
    return starts.cumsum(1).to(device)


def _gradients(out: Any, weight: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad((out * weight.detach()).sum(), inputs)


def _distance(result: Result, oracle: Result) -> float:
    """Largest difference of any output or gradient, relative to the largest value of that tensor."""
    return max(
        float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(result, oracle, strict=True)
    )


def check_ops(device: Any, dtype: Any) -> list[dict[str, Any]]:
    """A row for every op x implementation; usable ones are run forward and backward on small inputs.

    ``error`` is the distance to the reference in float64 on the CPU, ``tolerance`` 16 times the error that the
    reference itself makes in ``dtype`` here (a wrong mask or gradient is off by 1e-2 and more). ``ok`` is None where
    nothing was run.
    """
    import torch

    from sidlm.ops import dispatch

    rows: list[dict[str, Any]] = []
    for op, impl, usable, reason in dispatch.table(device, dtype):
        row = {"op": op, "impl": impl, "usable": usable, "reason": reason, "error": None, "tolerance": None, "ok": None}
        rows.append(row)
        check = CHECKS.get(f"{op}={impl}", CHECKS.get(op))
        if not usable or check is None:
            continue
        oracle = check(torch.float64, torch.device("cpu"), "reference")
        own = _distance(check(dtype, device, "reference"), oracle)
        row["tolerance"] = 16 * max(own, torch.finfo(dtype).eps)
        try:
            row["error"] = _distance(check(dtype, device, impl), oracle)
            row["ok"] = row["error"] <= row["tolerance"]
        except Exception as error:  # a kernel that does not even run is a finding of this command, whatever it raises
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            row["ok"] = False
    return rows


def _memory() -> dict[str, int | None]:
    """Bytes of main memory: all, and what is free for a new process (Linux; None elsewhere)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    available = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return {"total": total, "available": available}


def machine(device: Any) -> dict[str, Any]:
    """Versions, device, threads, memory and free disk of the working directory."""
    import torch

    from sidlm.train.hardware import environment

    facts = environment(device)
    facts["memory_bytes"] = _memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts["device_memory_bytes"] = {"total": total, "available": free}
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    facts["disk_free_bytes"] = shutil.disk_usage(".").free
    facts["sidlm"] = __version__
    facts["SID_IMPL"] = os.environ.get("SID_IMPL", "")
    return facts


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{part / 2**30:.1f} GiB {name}" for name, part in value.items() if part is not None)
    return "none" if value in (None, "") else str(value)


def _show(facts: dict[str, Any], rows: list[dict[str, Any]], dtype: Any) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table(title="machine", show_header=False)
    for name, value in facts.items():
        if name == "disk_free_bytes":
            value = f"{value / 2**30:.1f} GiB"
        about.add_row(name.removesuffix("_bytes"), _words(value))
    console.print(about)
    table = Table(title=f"operations in {dtype}", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    for title in ("op", "impl", "usable", "check", "error", "allowed"):
        table.add_column(title, no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        verdict = {None: "not run", True: "ok", False: "[red]FAILED[/red]"}[row["ok"]]
        measured = [f"{row[key]:.1e}" if row[key] is not None else "" for key in ("error", "tolerance")]
        table.add_row(row["op"], row["impl"], "yes" if row["usable"] else "no", verdict, *measured, row["reason"])
    console.print(table)


def main(argv: list[str]) -> int:
    parser = Parser(
        "doctor",
        "Show versions, hardware and, for every operation, which implementations can run here and why others cannot. "
        "Those that can are run on small inputs and compared with the reference. Exit status 1 if one is wrong.",
        "  sid doctor\n  SID_IMPL=simplicial=reference sid doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_device(parser)
    args = parser.parse_args(argv)

    import torch

    device = resolve_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts, rows = machine(device), check_ops(device, dtype)
    failed = [row for row in rows if row["ok"] is False]
    if args.json:
        print(json.dumps({"machine": facts, "dtype": str(dtype), "operations": rows}, indent=2))
    else:
        _show(facts, rows, dtype)
        wrong = ", ".join("{op}={impl}".format(**row) for row in failed)
        print(f"{len(failed)} implementations computed wrong numbers: {wrong}" if failed else "all checks passed")
    return 1 if failed else 0

"""What this machine is and what it can do: device, peak FLOP/s, peak memory, versions."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from sidlm.errors import SidError

# dense bf16 tensor-core FLOP/s of the vendors' data sheets (no sparsity); the first key that is a word of the name wins
PEAK_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250X": 383e12,
}


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of the device, and in words where the number comes from."""

    flops: float
    source: str


def resolve_device(name: str, setting: str = "train.device=") -> torch.device:
    """The device; "auto" is CUDA where there is one, else the CPU.

    Raises SidError for one that torch cannot use here; setting: what the user gave the name with.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SidError(f"{setting}{name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision; "auto" is bf16 autocast on CUDA, fp32 elsewhere. Weights and optimizer state are fp32 always."""
    return name if name != "auto" else ("bf16" if device.type == "cuda" else "fp32")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context the forward pass runs in: bf16 autocast, or a switched-off one for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_flops(device: torch.device, precision: str) -> Peak:
    """The denominator of MFU: data sheet for a known GPU in bf16, else the best of short matmuls measured here."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        flops = data_sheet_flops(name)
        if flops is not None:
            return Peak(flops, f"{name}: dense bf16 peak of the data sheet, {flops / 1e12:.0f} TFLOP/s")
    flops = measured_matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Peak(flops, f"{precision} matmul measured at start on this {device.type}: {flops / 1e9:.0f} GFLOP/s")


def data_sheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by torch's name for it, None if unknown (laptop parts are clocked lower)."""
    if "Laptop" in name:
        return None
    return next((flops for key, flops in PEAK_BF16.items() if re.search(rf"\b{key}\b", name)), None)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Best FLOP/s of square matmuls repeated for about `seconds`."""
    # on a busy CPU a short product fits between two other processes, a long one wakes its threads once for more work
    sizes = (512, 1024) if device.type == "cpu" else (8192,)
    return max(_matmul_flops(n, device, dtype, seconds / len(sizes)) for n in sizes)


def _matmul_flops(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    a, b = (torch.full((n, n), 0.5, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated device memory on CUDA, peak resident memory of the process elsewhere (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, object]:
    """Facts that a reader of the numbers will ask for: versions, machine, revision of the code."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "transformers", "triton", "sidlm")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({processor()})",
        "device_type": device.type,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(Path(__file__).resolve().parent),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name as the kernel tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout that `folder` lies in, read from .git without running git; None outside a checkout."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if git.is_file():  # a worktree: "gitdir: <path>"
            git = (parent / git.read_text().partition(":")[2].strip()).resolve()
        if not (git / "HEAD").is_file():
            continue
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head.removeprefix("ref: ")
        common = git / "commondir"
        roots = [git, *([(git / common.read_text().strip()).resolve()] if common.is_file() else [])]
        for root in roots:
            if (root / ref).is_file():
                return (root / ref).read_text().strip()
            packed = root / "packed-refs"
            for line in packed.read_text().splitlines() if packed.is_file() else ():
                if line.endswith(f" {ref}"):
                    return line.split()[0]
        return None
    return None

"""Preparing and timing one task of benchmarks/sparse24.py."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import _sparse24_data as data
import torch
from _simplicial_timing import Clock, describe, quantile, synchronize, time_in_turns
from _sparse24_dense import Layer
from _sparse24_rows import Task
from _sparse24_variants import (
    DENSE,
    Variants,
    bytes_of,
    gemm_variants,
    layer_variants,
    pack_variants,
)
from torch import Tensor

from sidlm.ops.sparse24.recipe import dense_count

WHAT = {
    "up": ("T", "d", "F"), "down": ("T", "F", "d"), "d_hidden": ("T", "d", "F"), "d_x": ("T", "F", "d"),
    "d_w_down": ("F", "T", "d"), "d_w_up": ("F", "T", "d"),
}  # fmt: skip
"""Product -> M, K, N"""
FEWEST, MOST = 5, 50


def variants_of(task: Task, layer: Layer, seed: int) -> Variants:
    if task.kind == "gemm":
        return gemm_variants(task, layer)
    return pack_variants(task, layer) if task.kind == "pack" else layer_variants(task, layer, seed)


def flops_of(task: Task) -> int:
    """Of the dense function: a product of M, K and N counts 2 M K N whatever is left out of it."""
    one = 2 * task.shape.T * task.shape.d * task.shape.F
    return one * {"gemm": 1, "forward": 2, "step": 6, "pack": 0}[task.kind]


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of the function: what the device needs, however slowly the host calls it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    return lambda: (graph.replay(), kept)[0]


def host_milliseconds(function: Callable[[], Any]) -> float:
    """Until the calls of one run are queued; the device's time hides it if that is longer."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[1]


def start(function: Callable[[], Any], device: torch.device, row: dict) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    """The function to time, and what its first call returned; the facts of that call go into the row."""
    if device.type != "cuda":
        return function, function()
    torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated(), time.perf_counter()
    result = function()
    synchronize(device)
    row["first_call_s"] = round(time.perf_counter() - begun, 3)  # compilation and the search of algorithms included
    torch.cuda.reset_peak_memory_stats()
    function()
    row["peak_memory_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
    row["host_ms"] = round(host_milliseconds(function), 3)
    try:
        replay = captured(function)
        row["timed"] = "graph"
        return replay, result
    except Exception as error:
        torch.cuda.synchronize()
        row |= {"timed": "calls", "why_no_graph": describe(error)[:200]}
        return function, result


def run_task(task: Task, layer: Layer, clock: Clock, seed: int, milliseconds: float) -> list[dict]:
    """One row a variant; an error is a row too."""
    about = {"kind": task.kind, "what": task.what, "precision": task.precision, **asdict(task.shape)}
    rows, timed, functions, first = [], [], [], None
    for name, function in variants_of(task, layer, seed).items():
        row = about | {"variant": name, "status": "ok"}
        rows.append(row)
        try:
            run, result = start(function, clock.device, row)
            wrong = [n for n, x in enumerate(result) if not x.isfinite().all()]
            if wrong:
                raise ArithmeticError(f"NaN or infinity in result {', '.join(map(str, wrong))} of {len(result)}")
            if first is None:
                first = name, result[:1]
            elif result and result[0].shape == first[1][0].shape:
                row |= {"difference": relative(result[0], first[1][0]), "difference_from": first[0]}
            timed.append(row)
            functions.append(run)
            del result
        except Exception as error:
            row |= {"status": "error", "error": describe(error)}
    try:
        times = time_in_turns(functions, clock, milliseconds) if functions else []
    except Exception as error:
        for row in timed:
            row |= {"status": "error", "error": describe(error)}
        return rows
    for row, samples in zip(timed, times, strict=True):
        low, middle, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
        row |= {"ms": middle, "ms_p20": low, "ms_p80": high, "repeats": len(samples)}
        if row["variant"].startswith("SwiGLU"):
            continue  # of nearly as many FLOPs
        if task.kind == "pack":
            dense = dense_count(task.shape.F, 0.05)
            moved = bytes_of(task.what, task.shape.T, task.shape.d, task.shape.F, dense, task.precision == "fp8")
            row |= {"bytes": moved, "gb_s": moved / middle / 1e6}
        else:
            row["tflops"] = flops_of(task) / middle / 1e9
    compare(timed)
    functions.clear()
    gc.collect()
    return rows


def compare(rows: list[dict]) -> None:
    """Speed-ups over the fastest dense variant, its name beside them."""
    dense = [row for row in rows if row["variant"].startswith(DENSE)]
    if not dense:
        return
    best = min(dense, key=lambda row: row["ms"])
    for row in rows:
        if not row["variant"].startswith(DENSE):
            row |= {"speedup": best["ms"] / row["ms"], "over": best["variant"]}


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def copy_bandwidth(clock: Clock, size: int = 1 << 30) -> float:
    """GB/s read and written by a copy, the best a kernel that streams can hope for."""
    size = size if clock.device.type == "cuda" else 1 << 22
    x, y = (torch.empty(size, dtype=torch.uint8, device=clock.device) for _ in "xy")
    (times,) = time_in_turns([lambda: y.copy_(x)], clock, 50)
    return 2 * size / quantile(times, 0.5) / 1e6


def prepare(task: Task, device: torch.device, seed: int) -> tuple[Layer, dict]:
    """The layer of a task's shape, and what its activations are like."""
    s = task.shape
    layer = data.layer(s.T, s.d, s.F, s.density, seed, device, torch.bfloat16)
    return layer, data.look(layer)._asdict()

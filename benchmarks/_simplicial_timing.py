"""Preparing and timing one task of benchmarks/simplicial.py."""

import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _simplicial_baselines import causal_sdpa, flex_virtual_queries, simplicial_attention_package
from _simplicial_rows import Shape, Task, Variant, document_lengths, flops_of
from torch import Tensor

from sidlm.ops import dispatch, two_simplicial_attention
from sidlm.ops.simplicial import api

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Prepared:
    """What a task's variants share."""

    xs: list[Tensor]
    grad: Tensor
    lengths: list[int] | None
    doc_ids: Tensor | None
    device: torch.device


def prepare(task: Task, device: torch.device, seed: int) -> Prepared:
    shape = task.shape
    make = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(heads: int) -> Tensor:
        return torch.randn(shape.B, shape.N, heads, shape.D, generator=make, device=device, dtype=dtype)

    xs = [normal(n) for n in (shape.H, *(shape.G,) * 4)]
    lengths = document_lengths(shape.N, seed) if shape.docs else None
    ids = None
    if lengths is not None:
        counts = torch.tensor(lengths, device=device)
        ids = torch.arange(len(lengths), device=device).repeat_interleave(counts).expand(shape.B, -1).contiguous()
    return Prepared(xs, normal(shape.H), lengths, ids, device)


def operation(variant: Variant, task: Task, prepared: Prepared) -> Callable[..., Any]:
    """(q, k, v, k2, v2) -> out."""
    if variant.baseline is None:
        given = {key: x for key in ("impl", "compensate") if (x := getattr(variant, key))}
        given |= {"window": task.shape.window, "form": variant.form, "doc_ids": prepared.doc_ids}
        return lambda *xs: two_simplicial_attention(*xs, **given)
    if variant.baseline == "flex":
        return flex_virtual_queries(task.shape.window, compiled=prepared.device.type == "cuda")
    if variant.baseline == "simplicial-attention":
        return simplicial_attention_package(task.shape.window, task.shape.D)
    return causal_sdpa(variant.baseline.split()[-1] if prepared.device.type == "cuda" else "math")


def callable_of(variant: Variant, task: Task, prepared: Prepared) -> Callable[[], Any]:
    """The function to time. What it returns is compared between the variants of a task."""
    if task.kind == "decode":
        return decode_function(variant, task.shape, prepared.device)
    if task.kind == "matmul":
        a, b = (torch.randn(task.shape.N, task.shape.N, device=prepared.device).to(prepared.grad.dtype) for _ in "ab")
        return lambda: a @ b
    op = operation(variant, task, prepared)
    if task.kind == "forward":

        def forward():
            with torch.no_grad():
                return op(*prepared.xs)

        return forward
    used = 3 if variant.baseline is not None and "SDPA" in variant.baseline else 5
    xs = [x.detach().requires_grad_() for x in prepared.xs]
    if task.kind == "step":
        return lambda: torch.autograd.grad(op(*xs), xs[:used], prepared.grad)
    out = op(*xs)
    return lambda: torch.autograd.grad(out, xs[:used], prepared.grad, retain_graph=True)


LAYERS = 32  # decode: as many layers, each with a cache of its own, in one graph, as in a model


def decode_function(variant: Variant, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """One token through LAYERS calls of the decoding op over full rings; on CUDA the replay of a graph."""
    from sidlm.ops import two_simplicial_decode

    assert shape.past is not None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    w1, w2 = shape.window
    sizes = [(1, shape.H), (w1, shape.G), (w1, shape.G), (w2, shape.G), (w2, shape.G)]
    layers = [[torch.randn(shape.B, *s, shape.D, device=device).to(dtype) for s in sizes] for _ in range(LAYERS)]
    lengths = torch.full((shape.B,), shape.past + 1, device=device)

    @torch.no_grad()
    def token():
        for q, k, v, k2, v2 in layers:
            out = two_simplicial_decode(q, k, v, k2, v2, lengths, window=shape.window, impl=variant.impl)
        return out

    if device.type != "cuda":
        return token
    token()  # compile before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = token()

    def replay():
        graph.replay()
        return out

    return replay


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds of single calls. On CUDA the events are read at the end, so that the queue never runs dry."""

    def __init__(self, device: torch.device):
        self.device = device
        size = 256 << 20 if device.type == "cuda" else 1
        self.cache = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> Callable[[], float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            passed = (time.perf_counter() - start) * 1e3
            return lambda: passed
        self.cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        function()
        end.record()
        return lambda: begin.elapsed_time(end)


def time_in_turns(functions: list[Callable[[], Any]], clock: Clock, milliseconds: float) -> list[list[float]]:
    """Times of each function, called in turns; about `milliseconds` for each, 5 to 100 calls.

    Every turn has another order: what ran before decides how hot the device is.
    """
    for function in functions:
        function()
    readings = [clock(function) for function in functions]
    synchronize(clock.device)
    slowest = max(reading() for reading in readings)
    repeats = max(5 if slowest < 1000 else 3, min(100, round(milliseconds / max(slowest, 1e-3))))
    shuffle, columns = random.Random(0).sample, [[] for _ in functions]
    for _ in range(repeats):
        for i in shuffle(range(len(functions)), len(functions)):
            columns[i].append(clock(functions[i]))
    synchronize(clock.device)
    return [[reading() for reading in column] for column in columns]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def difference(mine: Any, first: Any) -> float:
    """Largest relative L2 difference of the tensors that two variants returned."""
    pairs = zip(tensors(mine), tensors(first), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def start(variant: Variant, task: Task, prepared: Prepared, row: dict) -> tuple[Callable[[], Any], Any]:
    """The function to time and what its first call returned; the facts of that call go into the row."""
    device = prepared.device
    row["flops"] = flops_of(task, variant, prepared.lengths)
    if variant.baseline is None and variant.impl is None and task.kind != "decode":
        row["impl"] = dispatch.choose("simplicial", api.IMPLEMENTATIONS, None, device, prepared.grad.dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    function = callable_of(variant, task, prepared)
    result = function()
    synchronize(device)
    row["first_call_s"] = round(time.perf_counter() - begun, 3)  # compilation included
    if device.type == "cuda":
        row["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    if not all(x.isfinite().all() for x in tensors(result)):
        raise ArithmeticError("the result has NaN or infinity")
    return function, result


def run_task(task: Task, clock: Clock, seed: int, milliseconds: float) -> list[dict]:
    """One row a variant; an error is a row too."""
    rows, timed, functions, first = [], [], [], None
    torch.manual_seed(seed)
    prepared = prepare(task, clock.device, seed)
    for variant in task.variants:
        row = {"section": task.section, "kind": task.kind, "variant": variant.name, **asdict(task.shape)}
        row |= {"form": variant.form, "impl": variant.impl, "compensate": variant.compensate, "status": "ok"}
        rows.append(row)
        try:
            function, result = start(variant, task, prepared, row)
            if first is None:
                first = (variant, result)
            elif first[0].form == variant.form and "SDPA" not in variant.name:
                row |= {"difference": difference(result, first[1]), "difference_from": first[0].name}
            timed.append(row)
            functions.append(function)
        except Exception as error:
            row |= {"status": "error", "error": describe(error)}
    first = result = None
    try:
        times = time_in_turns(functions, clock, milliseconds) if functions else []
    except Exception as error:
        for row in timed:
            row |= {"status": "error", "error": describe(error)}
        return rows
    calls = LAYERS if task.kind == "decode" else 1
    for row, samples in zip(timed, times, strict=True):
        low, middle, high = (quantile(samples, q) / calls for q in (0.2, 0.5, 0.8))
        row |= {"ms": middle, "ms_p20": low, "ms_p80": high, "repeats": len(samples)}
        row["tflops"] = row["flops"] / middle / 1e9
    for row in timed[1:]:  # a determinant beside the product of the same implementation, else beside the first variant
        same = (x for x in timed if (x["impl"], x["compensate"]) == (row["impl"], row["compensate"]))
        product = next((x for x in same if x["form"] == "trilinear"), timed[0])
        other = timed[0] if row["form"] == "trilinear" else product
        row |= {"time_ratio": row["ms"] / other["ms"], "time_ratio_to": other["variant"]}
    return rows


def quantile(samples: list[float], q: float) -> float:
    ordered, at = sorted(samples), q * (len(samples) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def describe(error: Exception) -> str:
    text = str(error).strip().replace(f"{ROOT}/", "")
    return f"{type(error).__name__}: {re.sub(r'/[^ :]*/(site|dist)-packages/', '', text)}"[:600]


def is_usable(device: torch.device) -> bool:
    """Whether the device still works: an illegal access makes every later call of the process fail."""
    try:
        torch.ones(1, device=device).sum().item()
        return True
    except Exception:
        return False

"""Share of step time of each part of a model, from torch's profiler.

A matrix product is told by its shapes, anything else by the name of its kernel. On a CPU operators stand for kernels.
"""

import re
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType

PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|_scaled_mm|linear)\b|gemm|gemv|nvjet|cutlass|cublas", re.I)
# the first that matches wins
KERNELS = [
    ("2-simplicial", r"^forward_kernel|(backward_)?(keys|queries)_kernel|delta_kernel|simplicial"),
    ("2:4", r"tiles_kernel|rows_kernel|features_|columns_kernel|gradient_kernel|split_kernel|thin_kernel|turn_kernel"
            r"|transpose_\w+_kernel|cusparselt|sp_gemm|sparse|hopper_product|pack_"),
    ("attention", r"flex_attention|flash|fmha|cudnn.*sdpa|scaled_dot_product|sdpa"),
    ("optimizer and clipping", r"adam|multi_tensor|muon|foreach|lpnorm"),
    ("loss", r"log_softmax|logsumexp|softmax|nll"),
    ("collectives", r"nccl"),
]  # fmt: skip


def product_part(shapes: Any, size: Any, hidden: int) -> str:
    numbers = {n for shape in shapes or () if isinstance(shape, list | tuple) for n in shape if isinstance(n, int)}
    if size.vocab in numbers:
        return "loss"
    if numbers & {size.ffn, 3 * size.ffn // 2}:
        return "FFN GEMMs"
    return "attention projections" if hidden in numbers else "other GEMMs"


def kernel_part(name: str) -> str:
    for part, pattern in KERNELS:
        if re.search(pattern, name, re.I):
            return part
    return "other GEMMs" if PRODUCTS.search(name) else "other"


def shares(profile: Any, size: Any, hidden: int) -> dict[str, Any]:
    """{"parts": {part: share}, "microseconds", "top": [[kernel, share], ...]} of the profiled steps' device time."""
    parts: defaultdict[str, float] = defaultdict(float)
    kernels: defaultdict[str, float] = defaultdict(float)
    claimed: defaultdict[str, float] = defaultdict(float)
    on_device = False
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            if event.is_user_annotation or event.name.startswith(("##", "Optimizer.", "ProfilerStep")):
                continue  # a span over kernels that are counted themselves
            on_device = True
            kernels[event.name] += event.time_range.elapsed_us()
        elif PRODUCTS.search(event.name) and event.kernels:
            part = product_part(event.input_shapes, size, hidden)
            for kernel in event.kernels:
                parts[part] += kernel.duration
                claimed[kernel.name] += kernel.duration
    if not on_device:
        for event in profile.events():
            kernels[event.name] += event.self_cpu_time_total
            if PRODUCTS.search(event.name):
                parts[product_part(event.input_shapes, size, hidden)] += event.self_cpu_time_total
                claimed[event.name] += event.self_cpu_time_total
    for name, time in kernels.items():
        parts[kernel_part(name)] += max(0.0, time - claimed[name])
    total = sum(parts.values()) or 1.0
    top = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    return {
        "parts": {part: round(time / total, 4) for part, time in sorted(parts.items(), key=lambda item: -item[1])},
        "device_ms": round(total / 1e3, 2),
        "top": [[name[:120], round(time / total, 4)] for name, time in top],
    }


def start(cuda: bool) -> torch.profiler.profile:
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    profile = torch.profiler.profile(activities=kinds, record_shapes=True, acc_events=True)
    profile.__enter__()
    return profile

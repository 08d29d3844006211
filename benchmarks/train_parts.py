"""Attention and loss of a training step on one GPU, each way of computing them, against the machine's peak.

    python benchmarks/train_parts.py --json benchmarks/results/train_parts.json [--seconds 70]

Attention: forward and backward of one layer of a micro-batch of benchmarks/train_speed.py, on rows of one document
(torch's kernels, cuDNN's and flash attention's by name, FlexAttention) and on packed rows (flash kernels for documents,
FlexAttention), with the mean length of documents; the FLOPs are those of the pairs that see each other, 4 * pairs *
heads * dim forward and 2.5 times that backward. Errors are relative L2 distances from float32 dense attention, of the
output and of the gradient of q, k and v, beside those of torch's dense kernel in bf16. Loss: forward and backward of
32,768 tokens, by how many tokens a chunk has, beside its three products alone and what softmax must read and write at
the memory's bandwidth. Medians of --repeats; inputs are drawn once.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sidlm.ops import attention, attention_mask, linear_cross_entropy
from sidlm.ops.loss.linear_cross_entropy import chunks
from sidlm.train import hardware

SHAPES = {"1b": (8, 4096, 32, 8, 64), "8b-width": (2, 8192, 32, 8, 128), "tiny": (2, 256, 4, 2, 16)}
"""rows, length, heads, key heads, head_dim"""
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BANDWIDTH = 4.8e12
"""bytes per second, of an H200's data sheet"""


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of one call's time, after two more that are not counted."""
    cuda, found = torch.cuda.is_available(), []
    for _ in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def documents(rows: int, length: int, mean: int) -> tuple[Tensor, tuple[Tensor, int]]:
    """doc_ids (rows, length) of documents whose lengths are exponential, and their offsets."""
    draw = torch.Generator().manual_seed(0)
    starts = torch.rand(rows, length, generator=draw) < 1 / mean
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]
    offsets = torch.cat((first, torch.tensor([rows * length])))
    longest = min(length, 1 << (int(offsets.diff().max()) - 1).bit_length())
    return starts.cumsum(1), (offsets.int(), longest)


def ways(shape: tuple[int, ...], packed: bool, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name -> attention of (q, k, v)."""
    rows, length, heads, kv_heads, _ = shape
    found: dict[str, Callable[..., Tensor]] = {}
    settings: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    if packed:
        ids, (offsets, longest) = documents(rows, length, 1000)
        settings |= {"doc_ids": ids.to(device), "offsets": (offsets.to(device), longest)}

    def by(impl: str | None) -> Callable[..., Tensor]:
        mask = attention_mask(length, length, impl=impl, **settings)
        return lambda q, k, v: attention(q, k, v, mask=mask)

    found["default"] = by(None)
    found["flex"] = by("flex") if device.type == "cuda" else by("reference")
    if not packed and device.type == "cuda":
        for name, backend in BACKENDS.items():

            def run(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
                return out.transpose(1, 2)

            found[name] = run
    return found


def attention_rows(name: str, packed: bool, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    rows, length, heads, kv_heads, dim = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, h, dim, device=device, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn_like(q)
    xs = [x.requires_grad_() for x in (q, k, v)]
    if packed:
        lengths = documents(rows, length, 1000)[1][0].diff().double()
        pairs = float((lengths * (lengths + 1) / 2).sum())
    else:
        pairs = rows * length * (length + 1) / 2
    flops, done = 4 * pairs * heads * dim, []
    for way, run in ways(shape, packed, device).items():
        row: dict[str, Any] = {"part": "attention", "size": name, "packed": packed, "way": way}
        try:
            forward = seconds(lambda run=run: run(*xs), repeats)
            both = seconds(lambda run=run: torch.autograd.grad(run(*xs), xs, grad), repeats)
            row |= {"forward_ms": round(forward * 1e3, 3), "both_ms": round(both * 1e3, 3)}
            row |= {
                "forward_tflops": round(flops / forward / 1e12, 1),
                "both_tflops": round(3.5 * flops / both / 1e12, 1),
            }
            row["errors"] = errors(run, xs, grad, packed, shape)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        done.append(row)
    return done


def errors(
    run: Callable[..., Tensor], xs: list[Tensor], grad: Tensor, packed: bool, shape: tuple[int, ...]
) -> dict[str, list[float]]:
    """Relative L2 errors of the last row's output and gradients, and those of the dense kernel in bf16."""
    out = run(*xs)
    found = [x[-1:].float() for x in (out.detach(), *torch.autograd.grad(out, xs, grad))]
    ids = documents(shape[0], shape[1], 1000)[0][-1:].to(grad.device) if packed else None

    def dense(dtype: torch.dtype) -> list[Tensor]:
        ys = [x.detach()[-1:].to(dtype).requires_grad_() for x in xs]
        out = attention(*ys, doc_ids=ids, impl="sdpa")
        return [x.float() for x in (out.detach(), *torch.autograd.grad(out, ys, grad[-1:].to(dtype)))]

    exact, half = dense(torch.float32), dense(torch.bfloat16)
    return {
        kind: [float(f"{float((a - e).norm() / e.norm()):.2e}") for a, e in zip(some, exact, strict=True)]
        for kind, some in (("own", found), ("dense_bf16", half))
    }


def loss_rows(width: int, vocab: int, tokens: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device) / width**0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)
    common = {"part": "loss", "width": width, "vocab": vocab, "tokens": tokens}
    products = 3 * 2 * tokens * width * vocab
    default, done = chunks(tokens, vocab, None, device).step, []
    for chunk in dict.fromkeys((default, 1024, 4096, 8192)):

        def step(chunk: int = chunk) -> None:
            with torch.autocast(device.type, dtype=dtype):
                torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk=chunk), (hidden, weight))

        row = {**common, "way": f"chunks of {chunk}" + (", the default" if chunk == default else "")}
        try:
            taken = seconds(step, repeats)
            row |= {"both_ms": round(taken * 1e3, 2), "both_tflops": round(products / taken / 1e12, 1)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        done.append(row)
    x, w, g = hidden.detach()[:8192], weight.detach().to(dtype), torch.randn(8192, vocab, device=device, dtype=dtype)
    taken = sum(seconds(run, repeats) for run in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x)) * tokens / 8192
    # logits are read twice and written once by the products, read twice and written once by the softmax between them
    softmax = 3 * tokens * vocab * 2 / BANDWIDTH
    done.append({**common, "way": "its three products alone, 8192 tokens at once", "both_ms": round(taken * 1e3, 2),
                 "both_tflops": round(products / taken / 1e12, 1)})  # fmt: skip
    done.append({**common, "way": "the roof: these products and the softmax's bytes at the memory's bandwidth",
                 "both_ms": round((taken + softmax) * 1e3, 2)})  # fmt: skip
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=70, help="after which no further part is begun")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--commit", help="revision to record where the history is not there")
    args = parser.parse_args()
    device, began = torch.device(args.device), time.perf_counter()
    environment = hardware.environment(device) | ({"git_revision": args.commit} if args.commit else {})
    if device.type == "cuda":
        environment["cudnn"] = torch.backends.cudnn.version()
    report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "environment": environment, "rows": []}
    cuda = device.type == "cuda"
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda size=size, packed=packed: attention_rows(size, packed, device, args.repeats)
        for size in (("1b", "8b-width") if cuda else ("tiny",))
        for packed in (False, True)
    ]
    losses = [(2048, 128256, 32768), (4096, 128256, 16384)] if cuda else [(32, 512, 8192)]
    parts[2:2] = [lambda of=of: loss_rows(*of, device, args.repeats) for of in losses]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if time.perf_counter() - began > args.seconds:
            report["rows"].append({"left_out": f"parts after {time.perf_counter() - began:.0f} s"})
            break
        for row in part():
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

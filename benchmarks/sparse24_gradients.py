"""What each part of the 2:4 recipe does to the gradients of one layer; a CPU will do.

    python benchmarks/sparse24_gradients.py [--json benchmarks/results/sparse24_gradients.json] [--tokens 2048]
        [--width 128] [--features 2560] [--batches 8] [--seed 0]

Two layers: one whose activations are as sparse as those of trained ones, and sparse in their way (_sparse24_data.py),
and a fresh one, half of whose activations are alive. For the recipe and each of its ablations (arXiv 2503.16672, table
1) the relative L2 error of the gradients, beside the exact ones of the function that the forward pass computes: of one
batch, and of their mean over some batches, in which what is random grows small and what is one-sided stays. Prints a
table in Markdown. Float32.
"""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import _sparse24_data as data
import torch
from _sparse24_dense import Layer
from torch import Tensor

from sidlm.ops import squared_relu_ffn
from sidlm.train import hardware

ARMS = {
    "the full recipe": {},
    "no dense features": {"dense_features": 0.0},
    "no token permutation": {"permute_tokens": False},
    "no reuse of the forward mask": {"reuse_mask": False},
}
EXACT = {"dense_features": 1.0}
GRADIENTS = ("dx", "dw_up", "dw_down")


def fresh(given: Layer, seed: int) -> Layer:
    """The layer with random weights, before any training."""
    make = torch.Generator().manual_seed(seed)
    w_in = torch.randn(given.w_in.shape, generator=make) / given.w_in.shape[1] ** 0.5
    x = torch.randn(given.x.shape, generator=make)
    return given._replace(x=x, w_in=w_in)


def gradients(layer: Layer, tokens: slice, settings: dict) -> list[Tensor]:
    """out, the three gradients and the statistics, of these tokens."""
    inputs = [t.detach().requires_grad_() for t in (layer.x[tokens], layer.w_in, layer.w_down)]
    out, stats = squared_relu_ffn(*inputs, return_stats=True, **settings)
    return [out.detach(), *torch.autograd.grad(out, inputs, layer.grad[tokens]), stats]


def error(mine: Tensor, exact: Tensor) -> float:
    return ((mine - exact).norm() / exact.norm()).item()


def measured(layer: Layer, batches: int) -> dict:
    """Shares and errors of every arm, and of the forward pass beside the dense function."""
    size = len(layer.x) // batches
    parts = [slice(i * size, (i + 1) * size) for i in range(batches)]
    exact = [gradients(layer, part, {"sparsity": "2:4"} | EXACT) for part in parts]
    dense = gradients(layer, parts[0], {"sparsity": None})
    found = {"zeros": exact[0][4][0].item(), "dropped": exact[0][4][1].item(), "forward": error(exact[0][0], dense[0])}
    found["arms"] = {}
    for arm, settings in ARMS.items():
        mine = [gradients(layer, part, {"sparsity": "2:4"} | settings) for part in parts]
        row = {"dropped_along_tokens": mine[0][4][2].item()}
        for i, name in enumerate(GRADIENTS, start=1):
            row[name] = error(mine[0][i], exact[0][i])
            if i > 1:
                row[f"{name} mean"] = error(sum(m[i] for m in mine), sum(e[i] for e in exact))  # pyright: ignore
        found["arms"][arm] = row
    return found


def table(results: dict) -> str:
    lines = []
    for name, layer in results["layers"].items():
        lines += [
            "",
            f"{name}: {layer['zeros']:.1%} zeros, of the others {layer['dropped']:.2%} dropped forward; error of the "
            f"result beside the dense one {layer['forward']:.1%}",
            "",
            "| | dropped along tokens | dx | dw_up, of the mean | dw_down, of the mean |",
            "| --- | --- | --- | --- | --- |",
        ]
        for arm, row in layer["arms"].items():
            pairs = [f"{row[x]:.1%}, {row[f'{x} mean']:.1%}" for x in GRADIENTS[1:]]
            lines.append(f"| {arm} | {row['dropped_along_tokens']:.1%} | {row['dx']:.1%} | {' | '.join(pairs)} |")
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--features", type=int, default=2560)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cpu, tokens = torch.device("cpu"), args.tokens * args.batches
    trained = data.layer(tokens, args.width, args.features, 0.1, args.seed, cpu, torch.float32)
    layers = {"as trained": trained, "fresh": fresh(trained, args.seed)}
    facts = hardware.environment(cpu) | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seed": args.seed}
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    facts["command"] = " ".join(["python", "benchmarks/sparse24_gradients.py", *words])
    results = {"facts": facts, "layers": {name: measured(layer, args.batches) for name, layer in layers.items()}}
    print(table(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

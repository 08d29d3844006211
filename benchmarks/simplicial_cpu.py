"""2-simplicial attention on a CPU: time and peak memory of the eager form beside the naive einsum.

    python benchmarks/simplicial_cpu.py [--json benchmarks/results/simplicial_cpu.json]

Every case runs in a process of its own, since peak memory is a property of a process. The naive form builds the whole
(T, T, T) cube of logits, so it runs at short lengths only; at T = 2048 its logits alone would take 8 heads x 32 GiB.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from sidlm.ops import two_simplicial_attention
from sidlm.train import hardware

CASES = {
    "small, both": {"T": 256, "H": 2, "D": 64, "window": (64, 16), "impls": ("eager", "naive")},
    "n^3 fits, both": {"T": 512, "H": 1, "D": 64, "window": (512, 32), "impls": ("eager", "naive")},
    "paper's window": {"T": 2048, "H": 8, "D": 64, "window": (512, 32), "impls": ("eager",)},
    "paper's window, D=128": {"T": 2048, "H": 8, "D": 128, "window": (512, 32), "impls": ("eager",)},
    "twice as long": {"T": 4096, "H": 8, "D": 64, "window": (512, 32), "impls": ("eager",)},
    "wide second window": {"T": 2048, "H": 8, "D": 64, "window": (512, 512), "impls": ("eager",)},
}


def naive(q, k, v, k2, v2, *, window):
    """Algorithm 1 of the paper, as it stands: the cube of logits, a mask, a softmax."""
    steps, dim = q.shape[1], q.shape[3]
    back = torch.arange(steps)[:, None] - torch.arange(steps)
    first, second = ((back >= 0) & (back < w) for w in window)
    logits = torch.einsum("bthd,bshd,brhd->bhtsr", q, k, k2) * dim**-0.5
    logits = logits.masked_fill(~(first[:, :, None] & second[:, None, :]), -torch.inf)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhtsr,bshd,brhd->bthd", weights, v, v2)


def measure(case: dict, impl: str, repeats: int) -> dict:
    torch.manual_seed(0)
    shape = (1, case["T"], case["H"], case["D"])
    xs = [torch.randn(shape, requires_grad=True) for _ in range(5)]
    grad = torch.randn(shape)
    op = naive if impl == "naive" else two_simplicial_attention
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward, backward = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = op(*xs, window=tuple(case["window"]))
        middle = time.perf_counter()
        torch.autograd.grad(out, xs, grad)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    w1, w2 = case["window"]
    pairs = sum(min(i + 1, w1) * min(i + 1, w2) for i in range(case["T"]))
    flop = 4 * case["D"] * case["H"] * pairs  # forward; the backward pass is three times that
    result = {"forward_s": statistics.median(forward[1:]), "backward_s": statistics.median(backward[1:])}
    result["forward_gflops"] = flop / result["forward_s"] / 1e9
    result["backward_gflops"] = 3 * flop / result["backward_s"] / 1e9
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    result["rss_before_mb"] = before / 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        name, impl = args.only.split("|")
        print(json.dumps(measure(CASES[name], impl, args.repeats)))
        return
    rows = []
    print(
        f"{'case':<24}{'T':>6}{'H':>3}{'D':>5} {'window':>10} {'impl':<7}{'fwd s':>8}"
        f"{'bwd s':>8}{'GFLOP/s':>9}{'peak MB':>9}"
    )
    for name, case in CASES.items():
        for impl in case["impls"]:
            command = [sys.executable, __file__, "--only", f"{name}|{impl}", "--repeats", str(args.repeats)]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rows.append({"case": name, "impl": impl, **case, **row})
            window = "{},{}".format(*case["window"])
            rate = 4 * row["forward_gflops"] * row["forward_s"] / (row["forward_s"] + row["backward_s"])
            print(
                f"{name:<24}{case['T']:>6}{case['H']:>3}{case['D']:>5} {window:>10} {impl:<7}{row['forward_s']:>8.3f}"
                f"{row['backward_s']:>8.3f}{rate:>9.0f}{row['peak_rss_mb']:>9.0f}"
            )
        if len(case["impls"]) == 2:
            eager, other = rows[-2:]
            times = [x["forward_s"] + x["backward_s"] for x in (eager, other)]
            memory = [x["peak_rss_mb"] - x["rss_before_mb"] for x in (eager, other)]
            eager["naive_time_ratio"], eager["naive_memory_ratio"] = times[1] / times[0], memory[1] / memory[0]
            print(f"  naive / eager: time {times[1] / times[0]:.1f}x, memory above start {memory[1] / memory[0]:.1f}x")
    if args.json:
        facts = hardware.environment(torch.device("cpu")) | {"repeats": args.repeats}
        with open(args.json, "w") as file:
            json.dump({"facts": facts, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

"""Plans of the three runs in Llama 3's table of configurations, beside what was published: choices and speeds.

python benchmarks/plan_llama3.py --json benchmarks/results/plan_llama3.json
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from sidlm.models import preset
from sidlm.parallel.hardware import load_hardware
from sidlm.parallel.layout import Job, Layout
from sidlm.parallel.plan import Plan, plan
from sidlm.parallel.search import CP_TOKENS, MARGIN, Found, search
from sidlm.parallel.step_time import UNMODELLED
from sidlm.train.hardware import environment, resolve_device

TABLE = [  # GPUs, (TP, CP, PP, DP), tokens of a row, rows, TFLOP/s of a GPU; the third row's DP is 4 in the paper
    (8192, (8, 1, 16, 64), 8192, 2048, 430),
    (16384, (8, 1, 16, 128), 8192, 2048, 400),
    (16384, (8, 16, 16, 8), 131072, 128, 380),
]


def row(gpus: int, mesh: tuple[int, ...], seq_len: int, batch: int, published: float) -> dict[str, Any]:
    job, hardware = Job(config=preset("405b", arch="llama"), seq_len=seq_len, batch=batch), load_hardware("h100")
    start = time.perf_counter()
    found, free = search(job, gpus, hardware), search(job, gpus, hardware, cp_tokens=1024)
    best = found.winner
    raw = plan(job, best.layout, hardware, unmodelled=0)
    return {
        "gpus": gpus, "seq_len": seq_len, "published_mesh": mesh, "published_tflops": published,
        "winner": best.layout.describe(), "same_mesh": tuple(best.layout.mesh.values()) == mesh,
        "tflops": best.flops_per_second / 1e12, "error": best.flops_per_second / 1e12 / published - 1,
        "tflops_uncalibrated": raw.flops_per_second / 1e12,
        "error_uncalibrated": raw.flops_per_second / 1e12 / published - 1,
        "mfu": best.mfu, "memory_gb": best.memory.total / 1e9, "seconds": best.time._asdict(),
        "fastest": faster(found, best), "fastest_with_any_cp": faster(free, best), "meshes": len(found.meshes),
        "search_seconds": time.perf_counter() - start,
    }  # fmt: skip


def faster(found: Found, best: Plan) -> dict[str, Any]:
    gain = 1 - found.fastest.time.total / best.time.total
    return {"layout": found.fastest.layout.describe(), "faster_than_winner": gain}


def small() -> dict[str, Any]:
    """A measured run that nothing was calibrated on: a Llama of 125M parameters on one H200 (small_h200.json)."""
    with open("benchmarks/results/small_h200.json", encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    measured = [run["tokens_per_second"] for run in runs if run["arch"] == "llama"]
    job = Job(config=preset("small", arch="llama"), seq_len=1024, batch=16)
    planned = job.tokens / plan(job, Layout(micro_batch=16), load_hardware("h200")).time.total
    return {"measured_tokens_per_second": measured, "planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    results = {
        "facts": environment(resolve_device("cpu")),
        "constants": {"unmodelled": UNMODELLED, "margin": MARGIN, "cp_tokens": CP_TOKENS},
        "rows": [row(*entry) for entry in TABLE],
        "small": small(),
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    for found in results["rows"]:
        print(
            found["gpus"], found["winner"], f"{found['tflops']:.1f} {found['error']:+.1%}", found["fastest_with_any_cp"]
        )
    print(results["small"])


if __name__ == "__main__":
    main()

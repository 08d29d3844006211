"""Error of 2-simplicial attention against float64, beside what torch itself makes of the same computation.

    python benchmarks/simplicial_numerics.py [--impls hopper,hopper+,eager] [--out results.json] [--markdown table.md]

Inputs are rounded to the dtype first, so only the computation's error is seen. Float64 is the eager form, checked
against an independent float64 computation in every case. The rows of a case:

    hopper, triton, eager   the implementations (on a CPU, the eager form computes half precision in float32)
    hopper+                 with compensation (two_simplicial_attention(compensate=True)), for bfloat16
    torch SDPA              torch's own: scaled_dot_product_attention over written-out pairs k o k2 and v o v2 in that
                            dtype, gradients by autograd; the number after a cross is an error divided by this one's
    result rounded          the exact result rounded to the dtype (LSE: float32): no implementation can do better
    u in ...                float64, with the virtual queries u = q o k2 (k2 x q) rounded and nothing else

The inputs: "normal" is standard normal; "scaled" all of that times 8: a softmax of one weight; "concentrated" normal,
with q times what makes the median over rows of the largest weight 0.9; "upcycled" the start of an upcycled layer: k2
and v2 normal times 0.02, with biases of 1. The gradients are those of a standard normal gradient of the output.
Numbers: |x - x64| / |x64|, which positions with few pairs dominate, as theirs are the large outputs (`--measure
row_median` gives every row the same weight); for the LSE the absolute rms error. The JSON has all measures, and is
written after every case. `--render FILE` makes the Markdown again; `--device cpu` runs tiny shapes.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _simplicial_numerics_torch import (
    NAMES,
    Settings,
    Virtual,
    by_pair_keys,
    by_virtual_queries,
    concentrating_factor,
    errors,
)
from torch import Tensor

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial import api
from sidlm.train import hardware

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("normal", "scaled", "concentrated", "upcycled")
TORCH = "torch SDPA"
MEASURES = {"frobenius": "rms", "row_median": "rms", "max_over_rms": "max"}  # and which one of the LSE's goes with it


@dataclass(frozen=True)
class Case:
    dtype: str
    form: str
    kind: str
    B: int = 1
    T: int = 1024
    H: int = 64
    G: int = 1
    D: int = 128
    window: tuple[int, int] = (512, 32)

    @property
    def where(self) -> str:
        shape = " ".join(f"{name}={getattr(self, name)}" for name in "BTHGD")
        return f"{self.dtype}, {shape}, window ({self.window[0]}, {self.window[1]})"


def cases(device: str) -> list[Case]:
    """Most important first: --budget-seconds cuts the end off."""
    geometry: dict[str, Any] = {} if device == "cuda" else {"T": 40, "H": 4, "G": 2, "D": 16, "window": (12, 4)}
    both = ("trilinear", "determinant")
    found = [Case(d, f, kind, **geometry) for d in ("bfloat16", "float16") for f in both for kind in KINDS]
    if device == "cuda":
        found += [Case("bfloat16", f, kind, H=32, G=8, D=64) for f in both for kind in ("normal", "concentrated")]
    return found + [Case("float32", f, kind, **geometry) for f in both for kind in ("normal", "concentrated")]


@functools.lru_cache(maxsize=1)
def normal(case: Case, seed: int) -> list[Tensor]:
    """q, k, v, k2, v2 and the gradient of the output; drawn on the CPU, so alike on every machine."""
    make = torch.Generator().manual_seed(seed)
    heads = (case.H, *(case.G,) * 4, case.H)
    return [torch.randn(case.B, case.T, h, case.D, generator=make) for h in heads]


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[list[Tensor], Tensor, Settings, float]:
    """Inputs and gradient of the output rounded to the dtype, and the factor of what is scaled."""
    same = replace(case, dtype="", form="", kind="", window=(0, 0))  # what the draw does not depend on
    *xs, grad = (x.to(device) for x in normal(same, seed))
    settings, factor = Settings(case.window, case.form), 1.0
    if case.kind == "scaled":
        xs, factor = [8 * x for x in xs], 8.0
    elif case.kind == "concentrated":
        factor = concentrating_factor(xs, settings)
        xs[0] = xs[0] * factor
    elif case.kind == "upcycled":
        xs[3], xs[4] = 0.02 * xs[3], 0.02 * xs[4]
        settings = settings._replace(k2_bias=1.0, v2_bias=1.0)
    dtype = getattr(torch, case.dtype)
    return [x.to(dtype) for x in xs], grad.to(dtype), settings, factor


def run_implementation(name: str, xs: list[Tensor], s: Settings, grad: Tensor) -> dict[str, Tensor]:
    """Results by an implementation; "hopper+" is it with compensation."""
    xs = [x.detach().requires_grad_() for x in xs]
    how: dict[str, Any] = {"impl": name.removesuffix("+"), "compensate": name.endswith("+")}
    out, lse = two_simplicial_attention(*xs, **s._asdict(), return_lse=True, **how)
    results = (out.detach(), lse.detach(), *torch.autograd.grad(out, xs, grad))
    return dict(zip(NAMES, results, strict=True))


def disagreement(exact: dict[str, Tensor], virtual: Virtual) -> float:
    """Largest relative difference between the two float64 computations of output and LSE."""
    pairs = ((exact["out"], virtual.out), (exact["lse"], virtual.lse))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def measure(case: Case, impls: list[str], device: torch.device, seed: int) -> dict:
    xs, grad, settings, factor = make_inputs(case, device, seed)
    dtype = xs[0].dtype
    exact = run_implementation("eager", [x.double() for x in xs], settings, grad.double())
    virtual = by_virtual_queries(xs, settings)
    result: dict[str, Any] = {"factor": factor, "largest_u": virtual.largest_u, "rows": []}
    result["median_largest_weight"] = virtual.largest_weight.median().item()
    result["float64_disagreement"] = disagreement(exact, virtual)

    def add(name: str, compute) -> None:
        row: dict[str, Any] = {"name": name, "status": "ok"}
        result["rows"].append(row)
        start = time.perf_counter()
        try:
            results, facts = compute()
            row |= facts | {"errors": {x: errors(results[x], exact[x], x) for x in results}}
        except Exception as error:
            row |= {"status": "error", "reason": f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")[:600]}
        row["seconds"] = round(time.perf_counter() - start, 3)  # compilation included

    for impl in impls:
        reason = api.IMPLEMENTATIONS[impl.removesuffix("+")].why_not(device, dtype)
        if impl.endswith("+") and dtype != torch.bfloat16:
            reason = reason or "compensation is for bfloat16"
        if reason is not None:
            result["rows"].append({"name": impl, "status": "skipped", "reason": reason})
            continue
        add(impl, lambda impl=impl: (run_implementation(impl, xs, settings, grad), {}))

    def torch_alone():
        results, backend = by_pair_keys(xs, settings, grad)
        return results, {"backend": backend}

    def u_rounded(to: torch.dtype):
        rounded = by_virtual_queries(xs, settings, to)
        return {"out": rounded.out, "lse": rounded.lse}, {"overflows": rounded.overflows}

    add(TORCH, torch_alone)
    low = {x: exact[x].to(torch.float32 if x == "lse" else dtype) for x in exact}
    add("result rounded", lambda: (low, {}))
    for to in {torch.bfloat16: (torch.bfloat16, torch.float16), torch.float16: (torch.float16,)}.get(dtype, ()):
        add(f"u in {str(to).removeprefix('torch.')}", lambda to=to: u_rounded(to))
    for row in result["rows"]:
        for to in (TORCH, "eager"):
            row[f"ratio_to_{'torch' if to == TORCH else to}"] = ratios(row, named(result, to))
    return result


def named(case: dict, name: str) -> dict:
    return next(row for row in case["rows"] if row["name"] == name)


def value(row: dict, name: str, measure: str) -> float | None:
    """One error of a row; None where there is none."""
    return row.get("errors", {}).get(name, {}).get(MEASURES[measure] if name == "lse" else measure)


def ratios(row: dict, to: dict, measure: str = "frobenius") -> dict[str, float | None]:
    """How many times the errors of another row this row's are."""
    pairs = {x: (value(row, x, measure), value(to, x, measure)) for x in row.get("errors", {})}
    return {x: a / b if a is not None and b else None for x, (a, b) in pairs.items()}


def write(text: str, path: Path | None) -> None:
    """All of a file or nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    new.write_text(text)
    os.replace(new, path)


def facts_of(device: torch.device, args: argparse.Namespace) -> dict:
    known = hardware.environment(device)
    facts = {name: known[name] for name in ("device", "python", "torch", "triton", "sidlm")}
    facts |= {"git_revision": args.commit or known["git_revision"], "seed": args.seed}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cuda": torch.version.cuda, "driver": None}
    given = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    facts["command"] = " ".join(["python", "benchmarks/simplicial_numerics.py", *given])
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return facts


def cell(row: dict, name: str, to: dict, measure: str) -> str:
    if name not in row["errors"]:
        return ""
    error, ratio = value(row, name, measure), ratios(row, to, measure)[name]
    if error is None:
        return "not finite" if "nonfinite" in row["errors"][name] else "-"
    return f"{error:.1e}" + ("" if ratio is None or row is to else f" ×{ratio:.2g}")


def summary(found: list[dict], measure: str) -> list[str]:
    """Per dtype and implementation: all ratios to torch's own, over forms, inputs, geometries and results."""
    lines = ["| dtype | implementation | median ratio | largest ratio | where |", "| --- | --- | --- | --- | --- |"]
    own = {TORCH, "result rounded"}
    names = dict.fromkeys((c["dtype"], r["name"]) for c in found for r in c["rows"] if r["name"] not in own)
    for dtype, name in names:
        if name.startswith("u in "):
            continue
        all_ratios, reason = [], ""
        for case in (c for c in found if c["dtype"] == dtype):
            row = named(case, name)
            reason = reason or row.get("reason", "")
            per_result = ratios(row, named(case, TORCH), measure).items()
            where = f"{case['form']}, {case['kind']}, D={case['D']}"
            all_ratios += [(ratio, f"{x}: {where}") for x, ratio in per_result if ratio is not None]
        if all_ratios:
            largest, where = max(all_ratios)
            middle = statistics.median(ratio for ratio, _ in all_ratios)
            lines.append(f"| {dtype} | {name} | {middle:.2f} | {largest:.2f} | {where} |")
        else:
            lines.append(f"| {dtype} | {name} | | | {reason.replace('|', '/')[:120]} |")
    return lines


def render(results: dict, measure: str = "frobenius") -> str:
    facts, found = results["facts"], [c for c in results["cases"] if "rows" in c]
    about = (
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, revision {facts['git_revision']}, "
        f"seed {facts['seed']}: `{facts['command']}`"
    )
    kind = {
        "frobenius": "Relative error against float64 (Frobenius norm), the LSE's absolute rms error",
        "row_median": "Median over the rows of the relative error against float64, the LSE's absolute rms error",
        "max_over_rms": "Largest absolute error against float64 over the rms of the result, the LSE's absolute",
    }[measure]
    lines = [f"{about}.", "", f"{kind}; after the cross, how many times the error of torch's own attention this is."]
    apart = max((c["float64_disagreement"] for c in found), default=0.0)
    lines[-1] += f" Two float64 computations differ by {apart:.0e} at most."
    lines += ["", *summary(found, measure)]
    for where in dict.fromkeys(c["where"] for c in found):
        lines += ["", f"**{where}**", ""]
        lines += ["| form | inputs | by | " + " | ".join(NAMES) + " |", "| --- " * (3 + len(NAMES)) + "|"]
        for case in (c for c in found if c["where"] == where):
            inputs = f"{case['kind']} (largest weight {case['median_largest_weight']:.2g})"
            labels = f"| {case['form']} | {inputs} |"
            for row in (row for row in case["rows"] if row["status"] == "ok"):
                by = row["name"] + (f" ({row['overflows']} overflow)" if row.get("overflows") else "")
                cells = (cell(row, x, named(case, TORCH), measure) for x in NAMES)
                lines.append(f"{labels} {by} | " + " | ".join(cells) + " |")
                labels = "| | |"
    reasons = {
        (row["name"], case["dtype"], row["reason"]): None
        for case in found for row in case["rows"] if row["status"] != "ok"
    }  # fmt: skip
    not_run = [f"- {name}, {dtype}: {' '.join(reason.split())}" for name, dtype, reason in reasons]
    not_run += [f"- {c['where']}, {c['form']}, {c['kind']}: {c['reason']}" for c in results["cases"] if "reason" in c]
    return "\n".join([*lines, *(["", "Not run:", "", *not_run] if not_run else [])]) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--impls", default="hopper,hopper+,triton,eager", help="implementations; the eager form runs always"
    )
    parser.add_argument("--out", type=Path, help="JSON with every number")
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--measure", choices=MEASURES, default="frobenius", help="what the table shows")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="skip cases not begun by then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="revision to record where the script runs outside a checkout")
    parser.add_argument("--render", type=Path, metavar="JSON", help="make --markdown from a results file, and stop")
    args = parser.parse_args()
    args.impls = list(dict.fromkeys(name.strip() for name in (*args.impls.split(","), "eager")))
    unknown = [name for name in args.impls if name.removesuffix("+") not in api.IMPLEMENTATIONS]
    if unknown:
        parser.error(f"--impls has {', '.join(unknown)}, but there are {', '.join(api.IMPLEMENTATIONS)}")
    if not args.render and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; to try the script itself: --device cpu")
    return args


def main() -> None:
    args = parse()
    if args.render:
        text = render(json.loads(args.render.read_text()), args.measure)
        write(text, args.markdown)
        print(text)
        return
    device, started = torch.device(args.device), time.perf_counter()
    results: dict[str, Any] = {"facts": facts_of(device, args), "cases": []}
    for case in cases(args.device):
        head = {**asdict(case), "where": case.where}
        begun = time.perf_counter()
        if begun - started > args.budget_seconds:
            found = {"reason": f"the {args.budget_seconds:.0f} s of --budget-seconds were over"}
        else:
            try:
                found = measure(case, args.impls, device, args.seed)
            except Exception as error:  # float64 did not fit, say
                found = {"reason": f"{type(error).__name__}: {error}"[:600]}
        seconds = time.perf_counter() - begun
        results["cases"].append(head | found | {"seconds": round(seconds, 3)})
        results["seconds"] = round(time.perf_counter() - started, 1)
        write(json.dumps(results, indent=1, allow_nan=False) + "\n", args.out)
        write(render(results, args.measure), args.markdown)
        print(f"{case.where}, {case.form}, {case.kind}: {found.get('reason') or f'{seconds:.2f} s'}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print()
    print(render(results, args.measure))


if __name__ == "__main__":
    main()

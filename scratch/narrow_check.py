"""Correctness and speed of the kernels for narrow groups against float64, the eager form and the kernels before them.

    python scratch/narrow_check.py --out DIR --seconds 85
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

START = time.time()
# batch, steps, heads, groups, dim, window, s1, s2, documents, form, dtype, biases
CASES = [
    (2, 300, 8, 2, 128, (200, 32), None, None, 0, "trilinear", "bfloat16", (0.25, 1.0)),
    (2, 257, 8, 2, 128, (128, 32), None, None, 3, "determinant", "bfloat16", (0.25, 1.0)),
    (1, 203, 4, 4, 128, (100, 32), None, None, 0, "trilinear", "bfloat16", (0.0, 0.0)),
    (1, 203, 4, 4, 128, (100, 31), None, None, 0, "determinant", "bfloat16", (0.0, 1.0)),
    (2, 260, 16, 2, 128, (130, 20), None, None, 3, "trilinear", "bfloat16", (0.25, 1.0)),
    (2, 190, 8, 4, 64, (70, 20), 233, 211, 0, "trilinear", "bfloat16", (0.0, 1.0)),
    (2, 150, 6, 2, 64, (20, 90), None, None, 0, "trilinear", "float16", (0.25, 1.0)),
    (1, 1501, 8, 2, 128, (512, 32), None, None, 0, "trilinear", "bfloat16", (0.0, 0.0)),
    (1, 130, 15, 1, 128, (64, 9), None, None, 0, "determinant", "float16", (0.0, 0.0)),
    (2, 70, 8, 2, 128, (64, 32), 133, 101, 2, "trilinear", "bfloat16", (0.25, 1.0)),
]
# name, batch, steps, heads, groups, dim, form
SPEEDS = [
    ("llama", 1, 8192, 32, 8, 128, "trilinear"),
    ("mha", 1, 8192, 16, 16, 128, "trilinear"),
    ("1b", 2, 4096, 32, 8, 64, "trilinear"),
    ("r8", 1, 8192, 64, 8, 128, "trilinear"),
    ("llama det", 1, 8192, 32, 8, 128, "determinant"),
    ("r2", 1, 8192, 32, 16, 128, "trilinear"),
    ("r16", 1, 8192, 64, 4, 128, "trilinear"),
    ("llama 2k", 1, 2048, 32, 8, 128, "trilinear"),
]
NAMES = ("out", "lse", "q", "k", "v", "k2", "v2")


def emit(path, row):
    with open(path, "a") as f:
        f.write(json.dumps({"at": round(time.time() - START, 1), **row}) + "\n")
        f.flush()
        os.fsync(f.fileno())
    print(json.dumps(row), flush=True)


def make_inputs(case, device, seed=0):
    import torch

    batch, steps, heads, groups, dim, _, s1, s2, docs, _, dtype, _ = case
    make = torch.Generator().manual_seed(seed)
    shapes = [(steps, heads)] + [(s or steps, groups) for s in (s1, s1, s2, s2)]
    xs = [torch.randn(batch, *s, dim, generator=make).to(getattr(torch, dtype)).to(device) for s in shapes]
    ids = None
    if docs:
        length = max(x.shape[1] for x in xs)
        ids = torch.randint(-1, docs, (batch, length), generator=make).sort(dim=1).values.to(device)
    grads = [torch.randn(batch, steps, heads, *tail, generator=make).to(device) for tail in ((dim,), ())]
    grads[0] = grads[0].to(getattr(torch, dtype)).float()
    return xs, ids, grads


def run_all(xs, ids, grads, impl, case):
    import torch

    from sidlm.ops import two_simplicial_attention

    xs = [x.detach().requires_grad_() for x in xs]
    out, lse = two_simplicial_attention(
        *xs, doc_ids=ids, return_lse=True, impl=impl, window=case[5], form=case[9], k2_bias=case[11][0],
        v2_bias=case[11][1],
    )
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return [x.double().detach() for x in (out, lse, *torch.autograd.grad(loss, xs))]


def check(number, path, device, impl):
    import torch

    case = CASES[number]
    xs, ids, grads = make_inputs(case, device, number)
    exact = run_all([x.double() for x in xs], ids, [g.double() for g in grads], "eager", case)
    own = run_all(xs, ids, grads, "eager", case)
    begin = time.time()
    mine = run_all(xs, ids, grads, impl, case)
    first = time.time() - begin
    row = {"check": number, "case": str(case), "first_call_s": round(first, 1), "same_bits": {}, "error": {}, "ratio": {}}
    for name, e, o, m in zip(NAMES, exact, own, mine):
        row["error"][name] = float((m - e).norm() / e.norm())
        row["ratio"][name] = round(float((m - e).norm() / (o - e).norm().clamp_min(1e-12)), 3)
    emit(path, row)
    again = [run_all(xs, ids, grads, impl, case) for _ in range(5)]
    row = {"check": number, "same_bits": all(torch.equal(a, m) for x in again for a, m in zip(x, mine))}
    if ids is not None:
        row["nan_stays"] = []
        for victim in range(int(ids.max()) + 1):
            poisoned = [x.masked_fill((ids[:, -x.shape[1]:] == victim)[..., None, None], torch.nan) for x in xs]
            after = run_all(poisoned, ids, grads, impl, case)
            ok = all(torch.equal(a[ids[:, -a.shape[1]:] != victim], b[ids[:, -b.shape[1]:] != victim])
                     for a, b in zip(after, mine))
            row["nan_stays"].append(ok)
    elif case[0] == 2:
        poisoned = [x.index_fill(0, torch.tensor([0], device=device), torch.nan) for x in xs]
        after = run_all(poisoned, ids, grads, impl, case)
        row["nan_stays"] = [all(torch.equal(a[1], b[1]) for a, b in zip(after, mine))]
    emit(path, row)


class Bench:
    def __init__(self, spec):
        import torch

        from sidlm.ops.simplicial import hopper, portable

        self.name, batch, steps, heads, groups, dim, self.form = spec
        make = torch.Generator("cuda").manual_seed(0)
        new = lambda n: torch.randn(batch, steps, n, dim, generator=make, device="cuda").bfloat16()
        self.xs = [new(heads), *(new(groups) for _ in range(4))]
        self.grad = new(heads)
        self.settings = (512, 32, self.form, dim**-0.5, 0.0, 0.0, None)
        self.out, self.lse = hopper.forward(*self.xs, *self.settings)
        self.grad_lse = torch.zeros_like(self.lse)
        self.p = hopper._problem(*self.xs, 512, 32, self.form, 0.0, 0.0)
        self.scale = dim**-0.5
        self.delta = torch.empty_like(self.lse)
        portable.plan_delta(self.grad, self.grad_lse, self.out, self.delta).run()
        from sidlm.ops.simplicial.flops import visible_pairs

        self.flops = 12 * dim * batch * heads * visible_pairs(steps, (512, 32))

    def backward(self):
        from sidlm.ops.simplicial import hopper

        return hopper.backward(self.grad, self.grad_lse, *self.xs, self.out, self.lse, *self.settings)

    def queries(self, chunk=None):
        from sidlm.ops.simplicial import hopper_narrow_queries as nq

        cut = nq.cut(self.p)
        if chunk:
            cut = nq.Shares(chunk, -(-self.p.q.shape[1] // chunk))
        args = (self.grad, self.lse, self.delta, None, nq.outputs(self.p), nq.partial_sums(self.p))
        return nq.plan(self.p, cut, self.scale, *args)

    def keys(self, chunk=None, stages=None):
        from sidlm.ops.simplicial import hopper_narrow_keys as nk

        cut = nk.cut(self.p)
        if chunk:
            span = nk.KEYS + self.p.w1 - 1
            cut = nk.Shares(cut.blocks, chunk, -(-(span - 1) // chunk) + 1)
        sums = nk.partial_sums(self.p, cut, False)
        launch = nk.plan(self.p, cut, self.scale, self.grad, self.lse, self.delta, None, sums)
        if stages:
            launch.constants["STAGES"] = stages
        return launch


def median_ms(function, budget=0.35, least=4):
    import torch

    function()
    torch.cuda.synchronize()
    begin = time.time()
    function()
    torch.cuda.synchronize()
    repeats = max(least, min(30, int(budget / max(time.time() - begin, 1e-4))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(repeats)]
    for b, e in events:
        b.record()
        function()
        e.record()
    torch.cuda.synchronize()
    times = sorted(b.elapsed_time(e) for b, e in events)
    return times[len(times) // 2]


VARIANTS = [("queries", {"chunk": c}) for c in (64, 128, 256, 512)] + [
    ("keys", {"stages": 3}), ("keys", {"chunk": 64}), ("keys", {"chunk": 128}), ("keys", {"chunk": 512}),
    ("keys", {"chunk": 1024}),
]  # fmt: skip


def warm(index):
    """Compile what the timing needs, into the cache on disk."""
    bench = Bench(SPEEDS[index])
    bench.queries().run()
    bench.keys().run()
    if index == 0:
        bench.keys(stages=3).run()
    old_path()
    bench.backward()
    import torch

    torch.cuda.synchronize()


def old_path():
    from sidlm.ops.simplicial import hopper_narrow

    hopper_narrow.takes = lambda p: False


def timing(path, until):
    import torch

    from sidlm.ops.simplicial import hopper_narrow

    takes = hopper_narrow.takes
    for index, spec in enumerate(SPEEDS):
        if time.time() - START > until - 3:
            break
        try:
            bench = Bench(spec)
            row = {"speed": spec[0], "spec": str(spec)}

            def note(key, ms):
                row[key] = round(ms, 3)
                row[key + "_tflops"] = round(bench.flops / ms / 1e9, 1)

            note("queries", median_ms(bench.queries().run))
            note("keys", median_ms(bench.keys().run))
            hopper_narrow.takes = lambda p: True
            note("new", median_ms(bench.backward))
            new = bench.backward()
            hopper_narrow.takes = lambda p: False
            note("old", median_ms(bench.backward))
            old = bench.backward()
            row["difference"] = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(new, old)]
            emit(path, row)
            del new, old
            if index == 0:
                for kind, how in VARIANTS:
                    if time.time() - START > until - 3:
                        break
                    emit(path, {"variant": kind, **how, "ms": round(median_ms(getattr(bench, kind)(**how).run, 0.2), 3)})
            hopper_narrow.takes = takes
        except Exception:
            emit(path, {"speed": spec[0], "failed": traceback.format_exc()[-1500:]})
            hopper_narrow.takes = takes
            try:
                torch.cuda.synchronize()
            except Exception:
                break


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--check", type=int)
    parser.add_argument("--warm", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="hopper")
    options = parser.parse_args()
    path = Path(options.out) / "narrow.jsonl"
    if options.check is not None or options.warm is not None:
        try:
            if options.check is not None:
                check(options.check, path, options.device, options.impl)
            else:
                warm(options.warm)
        except Exception:
            emit(path, {"check": options.check, "warm": options.warm, "failed": traceback.format_exc()[-1500:]})
        return
    common = [sys.executable, __file__, "--out", options.out, "--device", options.device, "--impl", options.impl]
    jobs = [["--warm", str(i)] for i in range(3)] + [["--check", str(i)] for i in range(len(CASES))]
    jobs += [["--warm", str(i)] for i in range(3, len(SPEEDS))]
    running, waiting, ends = [], jobs, options.seconds - 32
    while (running or waiting) and time.time() - START < ends:
        while waiting and len(running) < 14:
            job = waiting.pop(0)
            running.append((job, subprocess.Popen([*common, *job], stdout=subprocess.DEVNULL)))
        time.sleep(0.2)
        running = [(job, p) for job, p in running if p.poll() is None]
    for job, process in running:
        process.kill()
        emit(path, {"killed": job})
    emit(path, {"phase": "timing", "not_started": waiting})
    if options.device == "cuda":
        import torch

        emit(path, {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
        timing(path, options.seconds)


if __name__ == "__main__":
    main()

"""Sample complexity on tasks over triples: every number of examples and seed of a task and variant as one model.

    python benchmarks/token_probes.py --out probes.jsonl [--processes 2] [--seconds 290] [--steps 1000]
        [--examples 256 1024 4096] [--seeds 0 1 2 3 4] [--tasks ...] [--variants ...] [--lr 2e-3]

The models and the split are those of `sid scaling probe`, which trains one at a time; here a problem is written in at
most --ways ways (order of facts, names), drawn beforehand. A line of OUT is one model; what did not end in time, or
failed, is said on the last lines of the output.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import time
import traceback
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _token_graph import Captured
from _token_seeds import SeedOptimizer, by_seed, together

from sidlm.models import SidForCausalLM
from sidlm.models.flops import num_parameters, train_flops_per_token
from sidlm.scaling.probes.curves import TEST_PROBLEMS, VARIANTS, Probe, accuracy, config
from sidlm.scaling.probes.tasks import TASKS, batch, problems
from sidlm.train.config import OptimConfig
from sidlm.train.hardware import autocast
from sidlm.train.schedule import ScheduleConfig, learning_rate

ROWS = 16384


@functools.lru_cache(maxsize=64)  # the variants of a task read the same rows
def rows_of(name: str, examples: int, seed: int, ways: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of a model's training problems, each written in as many ways as fit, at most `ways`."""
    task = TASKS[name]()
    found = problems(task, examples, test=False, seed=seed)
    rng = np.random.default_rng([seed, 3])
    written = [batch(task, found, rng) for _ in range(max(1, min(ways, ROWS // len(found))))]
    tokens, labels = (np.concatenate(x) for x in zip(*written, strict=True))
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def run(probes: list[Probe], ways: int, device: torch.device, say: Any) -> None:
    """Train models that differ in their seed and number of examples alone; says a row for each."""
    task, first, count = TASKS[probes[0].task](), probes[0], len(probes)
    made = config(first, task)
    models: list[Any] = []
    for probe in probes:
        torch.manual_seed(probe.seed)
        models.append(SidForCausalLM(made))
        models[-1].to(device).train()
    plain = copy.deepcopy(models[0])
    texts = [[x.to(device) for x in rows_of(p.task, p.examples, p.seed, ways)] for p in probes]
    test = batch(task, problems(task, TEST_PROBLEMS, test=True, seed=0), np.random.default_rng(1))
    tried = [(test, [x[:TEST_PROBLEMS].cpu().numpy() for x in text]) for text in texts]
    model = together(models)
    optimizer = SeedOptimizer(model, count, OptimConfig(lr=first.lr, weight_decay=0.1))

    def update(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = seed_losses(model, tokens, labels, count, device)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    captured = Captured(update, optimizer.forget_gradients) if device.type == "cuda" else None
    schedule = ScheduleConfig(warmup_steps=min(50, first.steps // 2))
    draws = [torch.Generator(device=device).manual_seed(probe.seed) for probe in probes]
    curves: list[list[dict[str, Any]]] = [[] for _ in probes]
    started = time.perf_counter()
    for step in range(first.steps):
        picked = [draw(text[0], text[1], first.batch, g) for text, g in zip(texts, draws, strict=True)]
        rows = [torch.cat(part) for part in zip(*picked, strict=True)]
        optimizer.set_rate(learning_rate(step, schedule, peak=first.lr, total_steps=first.steps))
        losses = (captured or update)(*rows)
        if step in (0, 100):
            after, problem = time.perf_counter() - started, captured.problem[-1200:] if captured else ""
            said = f"step {step}, {losses[0].item():.3f} after {after:.1f} s {problem}"
            print(f"{first.task} {first.variant}: {said}", flush=True)
        if (step + 1) % max(1, first.steps // 10) == 0:
            for i, (curve, loss) in enumerate(zip(curves, losses.tolist(), strict=True)):
                with torch.no_grad():
                    for name, p in plain.named_parameters():
                        p.copy_(by_seed(model.get_parameter(name), count)[i])
                new, seen = (accuracy(plain, tokens, labels, device) for tokens, labels in tried[i])
                curve.append({"step": step + 1, "loss": loss, "test": new, "train": seen})
    seconds = time.perf_counter() - started
    tokens_seen = task.length * first.batch * first.steps
    for probe, curve in zip(probes, curves, strict=True):
        facts = dataclasses.asdict(probe) | {"name": probe.name, "params": num_parameters(made), "chance": task.chance}
        facts |= {"flops": train_flops_per_token(made, task.length) * tokens_seen, "ways": ways, "together": count}
        say(facts | {"accuracy": curve[-1]["test"], "curve": curve, "seconds": seconds})


def draw(tokens: torch.Tensor, labels: torch.Tensor, count: int, g: torch.Generator) -> list[torch.Tensor]:
    """`count` rows with replacement."""
    chosen = torch.randint(len(tokens), (count,), device=tokens.device, generator=g)
    return [tokens[chosen], labels[chosen]]


def seed_losses(model: Any, tokens: torch.Tensor, labels: torch.Tensor, count: int, device: torch.device) -> Any:
    with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    sums = nll.view(count, -1).sum(1)
    return sums / (labels.view(count, -1) >= 0).sum(1)


def work(queue: Any, lines: Any, ways: int, device: str) -> None:
    """A process: trains what it finds in the queue."""
    torch.set_num_threads(1)
    while True:
        probes = queue.get()
        if probes is None:
            return lines.put(None)
        for impl in ("attention=sdpa,simplicial=triton", "attention=sdpa,simplicial=eager"):
            os.environ["SID_IMPL"] = impl if device == "cuda" else ""
            try:
                run(probes, ways, torch.device(device), lines.put)
                break
            except Exception:
                print(f"failed with SID_IMPL={impl!r}: {probes[0].name}\n{traceback.format_exc()[-1500:]}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--examples", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ways", type=int, default=16)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    context = multiprocessing.get_context("spawn")
    queue, lines = context.Queue(), context.Queue()
    waiting = 0
    for task in args.tasks:
        for variant in args.variants:
            common = {"task": task, "variant": variant, "steps": args.steps, "lr": args.lr}
            queue.put([Probe(**common, examples=n, seed=s) for n in args.examples for s in args.seeds])
            waiting += len(args.examples) * len(args.seeds)
    for _ in range(args.processes):
        queue.put(None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = (queue, lines, args.ways, device)
    processes = [context.Process(target=work, args=settings, daemon=True) for _ in range(args.processes)]
    for process in processes:
        process.start()
    end, working = time.monotonic() + args.seconds, args.processes
    with args.out.open("a", encoding="utf-8") as file:
        while working and time.monotonic() < end:
            try:
                row = lines.get(timeout=max(0.1, min(5.0, end - time.monotonic())))
            except Empty:
                continue
            if row is None:
                working -= 1
                continue
            waiting -= 1
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["seed"] == 0:
                print(f"{row['name']}: {row['accuracy']:.3f} in {row['seconds']:.0f} s", flush=True)
    print(f"{waiting} runs have not ended", flush=True)
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main()

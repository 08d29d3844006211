"""Sample complexity: accuracy on held-out problems against the number of training problems and of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.models.flops import num_parameters, train_flops_per_token
from sidlm.scaling.probes.tasks import TASKS, Task, batch, problems
from sidlm.train.config import OptimConfig
from sidlm.train.hardware import autocast
from sidlm.train.optim import clip_gradients, make_optimizer, set_learning_rate
from sidlm.train.schedule import ScheduleConfig, learning_rate

VARIANTS = ("full", "deeper", "sliding", "trilinear", "determinant")
TEST_PROBLEMS = 512


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One run: a model of a variant learns `examples` problems of a task for `steps` steps of `batch` rows."""

    task: str
    variant: str
    examples: int
    seed: int
    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    width: int = 64
    layers: int = 2

    @property
    def name(self) -> str:
        shape = f"{self.steps}x{self.batch} lr{self.lr:g} d{self.width} l{self.layers}"
        return f"{self.task} {self.variant} n{self.examples} {shape} seed {self.seed}"


def config(probe: Probe, task: Task) -> SidConfig:
    """The model: the last layer is the variant's, the others attend to everything.

    Windows are the whole row for pairs and half of it for the sliding control. "deeper" has as many full layers as come
    nearest to the FLOPs of "trilinear", at least one more than the others.
    """
    mixer = {"sliding": "sliding_attention", "trilinear": "simplicial_attention", "determinant": "simplicial_attention"}
    determinant = probe.variant == "determinant"
    fields: dict[str, Any] = {
        "vocab_size": task.vocab, "hidden_size": probe.width, "intermediate_size": 8 * round(probe.width / 3),
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": max(16, probe.width // 4),
        "mlp_type": "swiglu", "max_position_embeddings": task.length, "sliding_window": max(2, task.length // 2),
        "simplicial_window": [task.length, task.length],
        "simplicial_form": "determinant" if determinant else "trilinear",
        "simplicial_position": "rotation" if determinant else "rope", "simplicial_k2_bias": 0.0 if determinant else 1.0,
    }  # fmt: skip

    def build(layers: int, last: str) -> SidConfig:
        kinds = ["full_attention"] * (layers - 1) + [last]
        return SidConfig(**fields, num_hidden_layers=layers, layer_types=kinds)

    if probe.variant != "deeper":
        return build(probe.layers, mixer.get(probe.variant, "full_attention"))
    target = train_flops_per_token(build(probe.layers, "simplicial_attention"), task.length)
    deeper = [build(probe.layers + n, "full_attention") for n in range(1, 5)]
    return min(deeper, key=lambda c: abs(train_flops_per_token(c, task.length) - target))


def run_probe(probe: Probe, *, device: torch.device, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train and test; a plain dictionary with the accuracy at ten points of the run.

    Seeds decide the initial weights, the problems and their rows; all variants of a seed see the same rows. Raises
    ValueError where a task has not so many problems, KeyError for an unknown task.
    """
    task = TASKS[probe.task]()
    train_problems = problems(task, probe.examples, test=False, seed=probe.seed)
    test_rows = batch(task, problems(task, TEST_PROBLEMS, test=True, seed=0), np.random.default_rng(1))
    seen_rows = batch(task, train_problems[:TEST_PROBLEMS], np.random.default_rng(2))
    torch.manual_seed(probe.seed)
    made = config(probe, task)
    model: Any = SidForCausalLM(made)
    model.to(device).train()
    optimizer = make_optimizer(model, OptimConfig(lr=probe.lr, weight_decay=0.1))
    rng = np.random.default_rng([probe.seed, 3])
    schedule = ScheduleConfig(warmup_steps=min(50, probe.steps // 2))
    curve, started = [], time.perf_counter()
    for step in range(probe.steps):
        set_learning_rate(optimizer, learning_rate(step, schedule, peak=probe.lr, total_steps=probe.steps))
        chosen = rng.integers(0, len(train_problems), probe.batch)
        tokens, labels = batch(task, [train_problems[i] for i in chosen], rng)
        loss = _loss(model, tokens, labels, device)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, probe.steps // 10) == 0 or step + 1 == probe.steps:
            point = {"step": step + 1, "loss": loss.item()}
            point |= {"test": accuracy(model, *test_rows, device), "train": accuracy(model, *seen_rows, device)}
            curve.append(point)
            if say is not None:
                say(f"{probe.name}: step {step + 1}, test {point['test']:.3f}, train {point['train']:.3f}")
    return {
        "task": probe.task, "variant": probe.variant, "examples": probe.examples, "seed": probe.seed,
        "steps": probe.steps, "batch": probe.batch, "lr": probe.lr, "width": probe.width, "layers": probe.layers,
        "name": probe.name, "params": num_parameters(made), "chance": task.chance,
        "flops": train_flops_per_token(made, task.length) * task.length * probe.batch * probe.steps,
        "accuracy": curve[-1]["test"], "curve": curve, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _loss(model: Any, tokens: np.ndarray, labels: np.ndarray, device: torch.device) -> torch.Tensor:
    with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        return model(
            input_ids=torch.from_numpy(tokens).to(device),
            shift_labels=torch.from_numpy(labels).to(device),
            num_items_in_batch=int((labels >= 0).sum()),
            use_cache=False,
        ).loss


@torch.no_grad()
def accuracy(model: Any, tokens: np.ndarray, labels: np.ndarray, device: torch.device) -> float:
    """Share of the labelled positions whose most likely token is the label."""
    model.eval()
    with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        logits = model(input_ids=torch.from_numpy(tokens).to(device), use_cache=False).logits
    model.train()
    right = logits.argmax(-1).cpu().numpy() == labels
    return float(right[labels >= 0].mean())

"""The same run through the real command line on several meshes, and runs that go on on another mesh.

python benchmarks/mesh_runs.py --json benchmarks/results/mesh_runs.json

`sid train` in one process and under torchrun; fp32 on CPUs with gloo, packed documents, vocabulary of 521. Each run is
compared with that of one process, a run that went on on the same mesh with the undisturbed one on that mesh.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sidlm.train.hardware import environment
from sidlm.train.metrics import read_json_lines

STEPS, STOP = 12, 6
MODELS = {
    "sid": ["layer_types=[full_attention,simplicial_attention,sliding_attention]", "sliding_window=7"],
    "llama": ["layer_types=[full_attention,full_attention,full_attention]", "mlp_type=swiglu"],
    "experts": [
        "layer_types=[full_attention,simplicial_attention,full_attention]", "num_local_experts=4",
        "num_experts_per_tok=2", "moe_intermediate_size=32",
    ],
}  # fmt: skip
MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "FSDP 4": (4, {}),
    "FSDP 2": (2, {}),
    "HSDP 2 x 2": (4, {"parallel.dp_replicate": 2}),
    "TP 2 x DP 2": (4, {"parallel.tp": 2}),
    "CP 2 x DP 2": (4, {"parallel.cp": 2}),
    "PP 2": (2, {"parallel.pp": 2, "train.micro_batch_size": 2}),
    "EP 2": (2, {"parallel.ep": 2}),
    "EP 4": (4, {"parallel.ep": 4}),
    "EP 2 x PP 2": (4, {"parallel.ep": 2, "parallel.pp": 2, "train.micro_batch_size": 2}),
}
RUNS = {
    "sid": ["FSDP 4", "HSDP 2 x 2", "TP 2 x DP 2", "CP 2 x DP 2", "PP 2"],
    "llama": ["FSDP 4", "TP 2 x DP 2", "CP 2 x DP 2", "PP 2"],
    "experts": ["EP 2"],
}
MOVES = {  # from -> to, at step STOP
    "sid": [
        ("FSDP 4", "FSDP 4"), ("PP 2", "FSDP 4"), ("TP 2 x DP 2", "one process"), ("one process", "CP 2 x DP 2"),
        ("one process", "one process"), ("FSDP 4", "PP 2"),
    ],
    "llama": [],
    "experts": [("EP 2", "one process"), ("EP 2", "EP 4"), ("EP 2", "EP 2 x PP 2")],
}  # fmt: skip


def write_corpus(path: Path) -> None:
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("sim", "plex", "key", "pair", "cube") for b in ("a", "ed", "ing", "s", "")]
    with path.open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(rng.choice(words) for _ in range(rng.randint(3, 60)))}) + "\n")


def start(model: str, mesh: str, out: Path, corpus: Path) -> None:
    """The command to its end. Raises CalledProcessError with its messages on the screen."""
    processes, settings = MESHES[mesh]
    words = [
        "train", "--data.train", corpus, "--data.vocab_size", 521, "--data.seq_len", 64, "--data.cache_dir",
        corpus.parent / "cache", "--train.out", out, "--train.batch_size", 8, "--train.steps", STEPS, "--train.device",
        "cpu", "--train.precision", "fp32", "--checkpoint.every", STOP // 2, "--checkpoint.keep", 9,
        "--validation.every", STEPS, "--validation.documents", 4, "--schedule.warmup_steps", 2, "--model.set",
        "hidden_size=32", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=8", "num_hidden_layers=3",
        "intermediate_size=48", "simplicial_window=[8,4]", *MODELS[model],
    ]  # fmt: skip
    words += [word for key, value in settings.items() for word in (f"--{key}", value)]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launch, "sidlm.cli.main", *words]
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()


def stop_at(run: Path, copy: Path) -> None:
    """A copy of a run that was ended after step STOP."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > STOP:
            shutil.rmtree(path)


def compared(run: Path, other: Path) -> dict[str, Any]:
    """Worst relative difference of losses, gradient norms and validation; of exported weights the worst absolute one;
    and whether all of it is the same bit for bit. The same steps have read the same tokens, or it is an error."""
    found, expected = (read_json_lines(path / "metrics.jsonl") for path in (run, other))
    assert [(r["step"], r["tokens"]) for r in found] == [(r["step"], r["tokens"]) for r in expected]
    assert len(found) == STEPS
    worst = {
        name: max(abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True))
        for name in ("loss", "grad_norm")
    }
    worst["valid"] = abs(found[-1]["valid"]["all"]["loss"] / expected[-1]["valid"]["all"]["loss"] - 1)
    weights, others = (load_file(path / "model/model.safetensors") for path in (run, other))
    assert weights.keys() == others.keys()
    worst["weights"] = max(float((weights[name] - x).abs().max()) for name, x in others.items())
    return worst | {"bitwise": not any(worst.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        if arguments.json:
            result = {"environment": environment(torch.device("cpu")), "steps": STEPS, "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "text.jsonl"
        write_corpus(corpus)
        for model in arguments.models:
            place = Path(name) / model
            for mesh in ["one process", *RUNS[model]]:
                start(model, mesh, place / mesh, corpus)
                if mesh != "one process":
                    add({"model": model, "mesh": mesh} | compared(place / mesh, place / "one process"))
            for before, after in MOVES[model]:
                moved = place / f"{before} then {after}"
                stop_at(place / before, moved)
                start(model, after, moved, corpus)
                whole = place / (before if before == after else "one process")
                add({"model": model, "mesh": after, "from": before} | compared(moved, whole))


if __name__ == "__main__":
    main()

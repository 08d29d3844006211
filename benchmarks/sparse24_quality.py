"""What 2:4 activation sparsity costs in quality: the recipe and its ablations (arXiv 2503.16672, table 1) on real text.

    python benchmarks/sparse24_quality.py --train DATA... --valid FILE --tokenizer FOLDER [--config configs/micro.yaml]
        [--preset micro] [--set NAME=VALUE ...] [--warmup STEPS] [--seeds 0 1 2] [--arms dense recipe@2e-3,0.1 ...]
        [--once naive ...] [--best-of FILE] [--jobs 2] [--budget-seconds S]
        --json benchmarks/results/sparse24_quality.json --plot docs/results/sparse24_quality.png
        [--settings --train.steps 2000 ...]

Equal parameters (SwiGLU has three matrices, of 2/3 the width of squared ReLU, which --set can give), equal tokens,
the same batches for a seed, full attention in every layer unless --set says otherwise. Every run is `sid train` in a
process of its own, --jobs at a time. Results are written after every run: started again, the same command does what is
missing, and goes on with a run that was cut. It prints a table in Markdown; --replot trains nothing.

An arm may name the learning rate and the multiple of it for down_proj, recipe@2e-3,0.1, for squared ReLU and SwiGLU
want others. --best-of takes both from the runs of another results file with the lowest loss, of SwiGLU for SwiGLU and
of squared ReLU for the others, so that what is compared was not chosen on the seeds that it is compared on.

What --budget-seconds cuts is in the file under "cut", up to its last validation, and in no table.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from _corpus import trained

from sidlm.models import SidConfig, num_parameters, preset
from sidlm.train import hardware
from sidlm.train.config import RunConfig, load_config
from sidlm.train.settings import format_overrides, parse_overrides

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = {"mlp_type": "squared_relu", "mlp_sparsity": "2:4"}
ARMS: dict[str, tuple[str, dict]] = {
    "swiglu": ("SwiGLU, dense", {"mlp_type": "swiglu"}),
    "dense": ("squared ReLU, dense", {"mlp_type": "squared_relu"}),
    "recipe": ("2:4, the full recipe", RECIPE),
    "no_warmup": ("2:4, no warm-up", RECIPE),
    "naive": ("2:4, no dense features", RECIPE | {"mlp_dense_features": 0.0}),
    "no_permutation": ("2:4, no token permutation", RECIPE | {"mlp_permute_tokens": False}),
    "no_mask_reuse": ("2:4, no reuse of the forward mask", RECIPE | {"mlp_reuse_mask": False}),
}
"""Arm -> its name, and fields of the model's config."""
PAPER = {"swiglu": 2.654, "dense": 2.651, "recipe": 2.652, "no_warmup": 2.657, "naive": 2.682, "no_permutation": 2.919,
         "no_mask_reuse": 3.735}  # fmt: skip
"""Table 1 of the paper: 1.5B parameters, 63B tokens."""


RATES = ("--optim.lr", "--optim.down_proj_lr_scale")


def parts(arm: str) -> tuple[str, list[str]]:
    """Key of `ARMS`, and the rates that the arm names; ValueError for what is neither."""
    kind, _, rates = arm.partition("@")
    values = rates.split(",") if rates else []
    if kind not in ARMS or len(values) > len(RATES) or any(float(x) < 0 for x in values):
        raise ValueError(f"{arm!r} is no arm: {', '.join(ARMS)}, and with rates such as dense@2e-3,0.1")
    return kind, values


def chosen(arm: str, path: Path) -> str:
    """The arm with the rates of the best run of its family in this results file."""
    kind, _ = parts(arm)
    family = {"swiglu"} if kind == "swiglu" else {"dense", "recipe"}
    runs = [r for r in json.loads(path.read_text())["runs"] if parts(r["arm"])[0] in family]
    if not runs:
        sys.exit(f"{path} has no run of {' or '.join(sorted(family))} to take the rates of {kind} from")
    best = min(runs, key=lambda r: r["valid"][-1]["loss"])
    return "@".join([kind, *best["arm"].split("@")[1:]])


def base_words(args: argparse.Namespace) -> list[str]:
    """Settings of every arm but for its model fields, its seed and its folder."""
    words = [] if args.preset is None else ["--model.preset", args.preset]
    return [*words, "--model.arch", "sid", *args.settings]


def model_fields(args: argparse.Namespace, arm: str) -> dict:
    cfg: RunConfig = load_config(args.config, base_words(args))
    given = cfg.model.overrides | parse_overrides(args.set)
    size = preset(cfg.model.preset, arch="llama", **given)  # SwiGLU's
    kind, _ = parts(arm)
    fields = {"layer_types": ["full_attention"] * size.num_hidden_layers} | ARMS[kind][1] | given
    width = given.get("intermediate_size", 3 * size.intermediate_size // 2)
    fields["intermediate_size"] = round(2 * width / 3) if kind == "swiglu" else width
    if args.precision is not None and kind != "swiglu":
        fields["mlp_precision"] = args.precision
    return fields


def train_words(args: argparse.Namespace, arm: str, seed: int) -> tuple[list[str], Path]:
    """What follows `sid train` for one run, and its folder."""
    out = Path(args.out) / f"{arm}-{seed}"
    words = [args.config, "--model.set", *format_overrides(model_fields(args, arm))]
    kind, rates = parts(arm)
    words += ["--sparsity.warmup_steps", str(0 if kind == "no_warmup" else args.warmup)]
    words += ["--data.train", *args.train, "--data.valid", args.valid, "--data.tokenizer", args.tokenizer]
    words += ["--train.seed", str(seed), "--train.out", str(out), "--train.device", args.device]
    words += ["--samples.prompts", "--validation.documents", "96", "--validation.characters", "6000"]
    own_words = [word for pair in zip(RATES, rates, strict=False) for word in pair]
    return [*words, *base_words(args), *own_words], out


def run(args: argparse.Namespace, arm: str, seed: int, results: "Results", deadline: float) -> None:
    if time.monotonic() > deadline:
        return
    words, out = train_words(args, arm, seed)
    try:
        headline, records = trained(words, out, deadline)
    except (FileNotFoundError, statistics.StatisticsError):
        print(f"{arm} seed {seed}: cut before its second step", flush=True)
        return
    finished, config = out / "model" / "config.json", None
    row = {"arm": arm, "seed": seed} | headline
    if finished.is_file():
        config = json.loads(finished.read_text())
        row["parameters"] = num_parameters(SidConfig(**config))
    row |= {"command": without_folders(row["command"]), "device": results.facts["device"]}
    row["commit"] = results.facts["git_revision"]
    row["valid"] = [{"step": r["step"]} | r["valid"]["all"] for r in records if "valid" in r]
    measured = [{"step": r["step"]} | r["sparsity"] for r in records if "sparsity" in r]
    row["sparsity"] = [*measured[:-1:5], *measured[-1:]]
    row["loss"], row["loss_every"] = row["loss"][::10], 10
    now = f"{row['valid'][-1]['loss']:.4f} nats per token" if row["valid"] else "not validated"
    print(f"{arm} seed {seed}: {now}{'' if config else ', cut after step ' + str(row['steps'])}", flush=True)
    results.add(row | {"config": config})


def without_folders(command: str) -> str:
    """Absolute paths as their last part."""
    return " ".join(Path(word).name if os.path.isabs(word) else word for word in command.split(" "))


class Results:
    """The file of results: read when opened, written whole after every run."""

    def __init__(self, path: Path, facts: dict):
        self.path, self.facts, self.lock = path, facts, threading.Lock()
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.runs: list[dict] = known.get("runs", [])
        self.cut: list[dict] = known.get("cut", [])

    def find(self, arm: str, seed: int) -> dict | None:
        return next((r for r in self.runs if (r["arm"], r["seed"]) == (arm, seed)), None)

    def add(self, row: dict) -> None:
        with self.lock:
            self.cut = [r for r in self.cut if (r["arm"], r["seed"]) != (row["arm"], row["seed"])]
            (self.runs if row["config"] else self.cut).append(row)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_name(self.path.name + ".tmp")
            runs, cut = (",\n".join(map(json.dumps, rows)) for rows in (self.runs, self.cut))
            new.write_text(f'{{"facts": {json.dumps(self.facts)},\n"runs": [\n{runs}\n],\n"cut": [\n{cut}\n]}}\n')
            new.replace(self.path)


def missing(args: argparse.Namespace, results: Results) -> list[tuple[str, int]]:
    """Arm and seed of what is still to be run. Ends the program if the file holds runs of another kind."""
    wanted = [(arm, seed) for seed in args.seeds for arm in args.arms]
    wanted += [(arm, args.seeds[0]) for arm in args.once]
    for arm, seed in wanted:
        row = results.find(arm, seed)
        now = without_folders(shlex.join(["sid", "train", *train_words(args, arm, seed)[0]]))
        if row is not None and row["command"] != now:
            sys.exit(f"{results.path} has another run of {arm}, seed {seed}:\n{row['command']}\nbut not:\n{now}")
    return [one for one in wanted if results.find(*one) is None]


def percent(values: list[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    return f"{min(known):.3g} to {max(known):.3g}" if known else ""


def ordered(runs: list[dict]) -> list[str]:
    """The arms that were run, as `ARMS` has them, with fewer and lower rates first."""

    def place(arm: str) -> tuple[int, list[float]]:
        kind, rates = parts(arm)
        return list(ARMS).index(kind), [float(x) for x in rates]

    return sorted({r["arm"] for r in runs}, key=place)


def compared(arm: str, loss: dict[tuple[str, int], float], seed: int) -> str | None:
    """The dense squared-ReLU arm that an arm is compared with: of its own rates, or else the best."""
    own = "@".join(["dense", *arm.split("@")[1:]])
    if parts(arm)[0] != "swiglu" and (own, seed) in loss:
        return own
    known = [name for name, s in loss if s == seed and parts(name)[0] == "dense"]
    return min(known, key=lambda name: loss[name, seed], default=None)


def table(runs: list[dict]) -> str:
    """Markdown: validation loss of each arm over the seeds, and its distance from dense squared ReLU seed by seed."""
    loss = {(r["arm"], r["seed"]): r["valid"][-1]["loss"] for r in runs}
    lines = [
        "| | nats per token: mean (lowest to highest) | above dense, mean (by seed) | in the paper | bits per byte "
        "| zeros by layer, % | dropped: forward, % | of activations^T, % | of gradients^T, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ordered(runs):
        rows = sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
        kind, rates = parts(arm)
        name = f"{ARMS[kind][0]}, {' x '.join(rates)}" if rates else ARMS[kind][0]
        losses = [r["valid"][-1]["loss"] for r in rows]
        dense = {r["seed"]: loss[one, r["seed"]] for r in rows if (one := compared(arm, loss, r["seed"])) is not None}
        above = [loss[arm, seed] - other for seed, other in dense.items()]
        by_seed = ", ".join(f"{x:+.4f}" for x in above)
        last = [r["sparsity"][-1] for r in rows if r["sparsity"]]
        shares = [[v for s in last for v in s[key]] for key in ("zeros", "dropped", "dropped_act_t", "dropped_dact_t")]
        cells = [
            name,
            f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
            f"{statistics.mean(above):+.4f} ({by_seed})" if above else "",
            f"{PAPER[kind] - PAPER['dense']:+.3f}",
            f"{statistics.mean(r['valid'][-1]['bits_per_byte'] for r in rows):.4f}",
            *map(percent, shares),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict], path: Path) -> None:
    """Left: validation loss above that of dense squared ReLU. Right: zeros and what is dropped in the layers."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), dpi=150)
    loss = {(r["arm"], r["seed"]): r["valid"][-1]["loss"] for r in runs}
    at = {(r["arm"], r["seed"], v["step"]): v["loss"] for r in runs for v in r["valid"]}
    for i, arm in enumerate(ordered(runs)):
        rows = sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
        kind, rates = parts(arm)
        name = f"{ARMS[kind][0]}, {' x '.join(rates)}" if rates else ARMS[kind][0]
        steps = sorted({v["step"] for r in rows for v in r["valid"]})
        curves = [
            [
                v["loss"] - at.get((compared(arm, loss, r["seed"]), r["seed"], v["step"]), float("nan"))
                for v in r["valid"]
            ]
            for r in rows
        ]
        mean = [statistics.mean(point) for point in zip(*curves, strict=True)]
        left.plot(steps, mean, color=f"C{i}", label=name, marker="o", markersize=2.5, linewidth=1.2)
        for r in rows:
            if kind == "recipe" and r["sparsity"]:
                last, layers = r["sparsity"][-1], range(1, len(r["sparsity"][-1]["zeros"]) + 1)
                first = r is rows[0]
                right.plot(layers, last["zeros"], "C0-o", markersize=2.5, label="zeros" if first else None)
                for key, colour, what in (("dropped", "C1", "forward"), ("dropped_act_t", "C2", "activations^T"),
                                          ("dropped_dact_t", "C3", "gradients^T")):  # fmt: skip
                    values = [float("nan") if v is None else v for v in last[key]]
                    label = f"non-zeros dropped, {what}" if first else None
                    right.plot(layers, values, f"{colour}-o", markersize=2.5, label=label)
    left.set(xlabel="step", ylabel="validation loss above dense, nats per token")
    right.set(xlabel="layer", ylabel="share, end of training, full recipe", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def facts_of(args: argparse.Namespace) -> dict:
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    facts = hardware.environment(hardware.resolve_device(args.device))
    facts |= {"command": " ".join(["python", "benchmarks/sparse24_quality.py", *words]), "jobs": args.jobs}
    return facts | {"threads_per_run": 1, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/micro.yaml")
    parser.add_argument("--preset", help="another size than the config's")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="model fields of every arm")
    parser.add_argument("--precision", choices=["bf16", "fp8"], help="mlp_precision of every squared-ReLU arm")
    parser.add_argument("--best-of", type=Path, metavar="JSON", help="results whose best rates every arm takes")
    parser.add_argument("--warmup", type=int, default=1000, help="dense steps of the arms that have them")
    parser.add_argument("--train", nargs="+", default=[])
    parser.add_argument("--valid")
    parser.add_argument("--tokenizer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="NAME or NAME@LR[,SCALE]")
    parser.add_argument("--once", nargs="+", default=[], metavar="ARM", help="then arms of the first seed alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget-seconds", type=float, default=threading.TIMEOUT_MAX, help="then end what still runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="runs/sparse24_quality", help="where the run folders go")
    parser.add_argument("--json", required=True)
    parser.add_argument("--plot")
    parser.add_argument("--replot", action="store_true", help="train nothing")
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="more settings of sid train, last")
    args = parser.parse_args()
    if not args.replot and not (args.train and args.valid and args.tokenizer):
        parser.error("--train, --valid and --tokenizer are needed to train")
    if any(word.startswith("--model.set") for word in args.settings):
        parser.error("model fields are given with --set")
    try:
        for arm in (*args.arms, *args.once):
            parts(arm)
    except ValueError as error:
        parser.error(str(error))
    if args.best_of is not None:
        args.arms, args.once = ([chosen(arm, args.best_of) for arm in arms] for arms in (args.arms, args.once))
    return args


def main() -> None:
    args = arguments()
    deadline = time.monotonic() + args.budget_seconds
    results = Results(Path(args.json), {} if args.replot else facts_of(args))
    if not args.replot:
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(run, args, *one, results, deadline) for one in missing(args, results)]:
                future.result()
    print(table(results.runs))
    if args.plot:
        plot(results.runs, Path(args.plot))


if __name__ == "__main__":
    main()

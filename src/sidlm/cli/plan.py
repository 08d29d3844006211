"""`sid plan CONFIG.yaml --gpus N`: memory, traffic, time and MFU of a training run on GPUs that need not be there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.parallel.layout import Job, Layout
    from sidlm.parallel.plan import Plan
    from sidlm.parallel.search import Found
    from sidlm.train.config import RunConfig

MESH = {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "dp_shard": "dp", "dp_replicate": "replicas"}
"""Names in --mesh -> sizes of a layout"""


def main(argv: list[str]) -> int:
    """Print the plan. Raises SidError, after the numbers, if nothing fits into memory."""
    parser = _parser()
    args, settings = parser.parse_known_args(argv)
    strays = [word for word in settings if word.startswith("-") and "." not in word]
    if strays:
        parser.parse_args(argv)  # names the nearest option
    from sidlm.train.config import RunConfig, load_config
    from sidlm.train.settings import argv_settings

    cfg = load_config(args.config, settings)
    if {"data.seq_len", "train.batch_size"} & {key for key, *_ in argv_settings(RunConfig, settings)}:
        cfg = replace(cfg, recipe=replace(cfg.recipe, batch=()))  # rows that are given are the ones to plan

    from sidlm.parallel.hardware import load_hardware
    from sidlm.parallel.search import search

    job = job_of(cfg, args.precision)
    fixed = mesh_of(args.mesh, args.gpus) if args.mesh else None
    found = search(
        job, args.gpus, load_hardware(args.hardware), fixed, how=args.recompute, cp_tokens=args.tokens_per_cp_rank
    )
    checked = check_shards(found.winner)
    if args.json:
        print(json.dumps(_as_dict(found, checked), indent=2))
    else:
        from sidlm.cli.plan_tables import show

        show(found, checked, title=args.config)
    if not found.winner.fits:
        needed, there = found.winner.memory.total, found.winner.hardware.memory_bytes
        run = f"{args.gpus:,} x {found.winner.hardware.name}"
        raise SidError(
            f"out of memory: {run} would need {needed / 1e9:.1f} GB on a GPU that "
            f"has {there / 1e9:.1f} GB; take more GPUs, smaller rows or a smaller model"
        )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "plan",
        "What a training run would need and how fast it would be: bytes of weights, gradients, optimizer state and "
        "activations on a GPU, collectives and bytes of a step, pipeline bubble, time of a step and MFU. Searches "
        "meshes [TP, CP, PP, DP], micro-batches, stages and recomputation, and says why others lose. Needs no GPU.",
        "  sid plan configs/405b.yaml --gpus 16384\n"
        "  sid plan configs/405b.yaml --gpus 16384 --mesh tp=8,cp=1,pp=16,dp=128 --json\n"
        "  sid plan configs/8b.yaml --gpus 64 --hardware h200 --data.seq_len 32768 --train.batch_size 128",
    )
    parser.add_argument("config", help="config of the run, as for `sid train`; --section.key VALUE changes it")
    parser.add_argument("--gpus", type=number(int, 1), required=True, help="how many")
    parser.add_argument(
        "--hardware", default="h100", help="h100, h200, b200, or a YAML file like theirs (default: h100)"
    )
    parser.add_argument("--mesh", default="", help="this mesh instead of a search: tp=8,cp=1,pp=16,dp=128")
    parser.add_argument("--recompute", choices=("none", "cheap", "blocks"), help="this instead of all three")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16", help="of the passes")
    parser.add_argument(
        "--tokens-per-cp-rank", type=number(int, 1), default=4096, metavar="N",
        help="of a row, what context parallelism leaves a rank at least (default: 4096)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def job_of(cfg: RunConfig, precision: str) -> Job:
    """The model and the batches of a run, of several sizes the last. Raises SidError for a model that there is not."""
    from sidlm.models import preset
    from sidlm.parallel.layout import Job
    from sidlm.train.recipe import phases

    if cfg.model.init_from:
        from sidlm.models.convert.source import read_config
        from sidlm.train.build import start_folder

        config = read_config(start_folder(cfg.model.init_from), cfg.model.overrides)
    else:
        vocab_size = cfg.data.vocab_size
        if cfg.data.tokenizer:
            from sidlm.data import Tokenizer

            vocab_size = Tokenizer.load(Path(cfg.data.tokenizer)).vocab_size
        settings = {"vocab_size": vocab_size, **cfg.model.overrides}
        try:
            config = preset(cfg.model.preset, arch=cfg.model.arch, **settings)
        except (ValueError, TypeError) as error:
            raise SidError(f"model: {' '.join(str(error).split())}") from error
    last = phases(cfg)[-1]
    return Job(config=config, seq_len=last.seq_len, batch=last.batch_size, precision=precision)


def mesh_of(text: str, gpus: int) -> Layout:
    """A mesh given by hand. Raises SidError unless its sizes multiply to the number of GPUs."""
    from sidlm.parallel.layout import Layout

    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in MESH or not equals or not value.isdigit() or int(value) < 1:
            raise SidError(f"--mesh: expected NAME=SIZE,... with names of {', '.join(MESH)}, got {part.strip()!r}")
        sizes[MESH[name]] = int(value)
    layout = replace(Layout(), **sizes)
    if layout.gpus != gpus:
        product = " x ".join(f"{name} {size}" for name, size in layout.mesh.items())
        raise SidError(f"--mesh: {product} = {layout.gpus}, but --gpus is {gpus}")
    return layout


def check_shards(plan: Plan) -> dict[str, Any]:
    """Bytes of the parameters on a GPU as planned, and as the real plans split them under a fake process group."""
    from sidlm.parallel.dry_run import shard_sizes
    from sidlm.parallel.layout import EMBEDDING, HEAD
    from sidlm.parallel.memory import FLOAT32, units_of_rank

    job, layout = plan.job, plan.layout
    units = [unit for stage in units_of_rank(job.config, layout, plan.memory.rank) for unit in stage]
    sizes = shard_sizes(job, layout)
    if job.config.tie_word_embeddings and EMBEDDING in units and HEAD in units:
        sizes[HEAD] -= sizes[EMBEDDING]
    return {"planned": plan.memory.parameters, "built": FLOAT32 * sum(sizes[unit] for unit in units)}


def _as_dict(found: Found, checked: dict[str, Any]) -> dict[str, Any]:
    from sidlm.parallel.plan import recomputations
    from sidlm.parallel.search import neighbours, reason

    return {
        "hardware": found.winner.hardware.name,
        "plan": found.winner.as_dict(),
        "parameter_bytes": checked,
        "recomputation": {
            other.layout.recompute: {"activations": other.memory.activations, "total": other.memory.total}
            | {"seconds": other.time.total, "fits": other.fits}
            for other in recomputations(found.winner)
        },
        "fastest": found.fastest.as_dict(),
        "others": [
            {"layout": other.layout.describe(), "why_not": reason(other, found.winner)} | other.as_dict()
            for other in neighbours(found)
        ],
        "meshes_searched": len(found.meshes),
    }

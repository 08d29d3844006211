"""`sid plan CONFIG.yaml --gpus N`: memory, traffic, time and MFU of a training run on GPUs that need not be there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.cli.common import Parser, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.parallel.hardware import Hardware
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
    given = {key for key, *_ in argv_settings(RunConfig, settings)}
    if {"data.seq_len", "train.batch_size"} & given:
        cfg = replace(cfg, recipe=replace(cfg.recipe, batch=()))  # rows that are given are the ones to plan

    from sidlm.parallel.hardware import load_hardware
    from sidlm.parallel.search import search

    job, hardware = job_of(cfg, args.precision), load_hardware(args.hardware)
    data = data_of(cfg) if {"data.train", "data.valid"} & given else {}
    if args.mesh == "config":
        found = as_configured(cfg, job, args.gpus, hardware)
    else:
        fixed = mesh_of(args.mesh, args.gpus) if args.mesh else None
        found = search(job, args.gpus, hardware, fixed, how=args.recompute, cp_tokens=args.tokens_per_cp_rank)
    checked, whole = check_shards(found.winner), whole_run(cfg, found.winner)
    if args.json:
        print(json.dumps(_as_dict(found, checked) | {"run": whole, "data": data}, indent=2))
    else:
        from sidlm.cli.plan_tables import show, show_run

        show(found, checked, title=args.config)
        show_run(whole, data)
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
        "  sid plan configs/405b.yaml --gpus 16384 --mesh config --data.train notes.txt\n"
        "  sid plan configs/405b.yaml --gpus 16384 --mesh tp=8,cp=1,pp=16,dp=128 --json\n"
        "  sid plan configs/8b.yaml --gpus 64 --hardware h200 --data.seq_len 32768 --train.batch_size 128",
    )
    parser.add_argument("config", help="config of the run, as for `sid train`; --section.key VALUE changes it")
    parser.add_argument("--gpus", type=number(int, 1), required=True, help="how many")
    parser.add_argument(
        "--hardware", default="h100", help="h100, h200, b200, or a YAML file like theirs (default: h100)"
    )
    parser.add_argument(
        "--mesh", default="",
        help="this mesh instead of a search: tp=8,cp=1,pp=16,dp=128; or config: mesh, micro-batch, stages and "
        "recomputation as the config has them, exactly what `sid train` would run",
    )  # fmt: skip
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


def as_configured(cfg: RunConfig, job: Job, gpus: int, hardware: Hardware) -> Found:
    """The plan of a run as its config has it. Raises SidError for one that so many processes cannot run."""
    from sidlm.parallel.layout import Layout, check
    from sidlm.parallel.plan import plan
    from sidlm.parallel.search import Found
    from sidlm.train.recipe import micro_batch_rows

    sizes = cfg.parallel.sizes(gpus)
    groups = sizes["dp_shard"] * sizes["dp_replicate"]
    layout = Layout(
        tp=sizes["tp"], cp=sizes["cp"], pp=sizes["pp"], dp=sizes["dp_shard"], replicas=sizes["dp_replicate"],
        # without one a pipeline takes rows one by one, everything else all rows of a process at once
        micro_batch=micro_batch_rows(cfg, job.seq_len) or (1 if sizes["pp"] > 1 else max(1, job.batch // groups)),
        virtual=cfg.parallel.pipeline.virtual_stages, recompute=cfg.train.recompute,
        reshard=cfg.parallel.reshard_after_forward,
    )  # fmt: skip
    check(layout, job)
    only = plan(job, layout, hardware)
    return Found(only, only, [only])


def whole_run(cfg: RunConfig, best: Plan) -> dict[str, Any]:
    """{"steps", "tokens", "seconds": at the speed of the planned step}."""
    from sidlm.data.phases import tokens_before
    from sidlm.train.recipe import phases

    tokens = tokens_before(phases(cfg), cfg.train.steps)
    return {"steps": cfg.train.steps, "tokens": tokens, "seconds": tokens / best.job.tokens * best.time.total}


def data_of(cfg: RunConfig) -> dict[str, dict[str, int]]:
    """{source: {"files", "bytes"}} of training and validation, none of them read; of the Hugging Face hub nothing.

    Raises SidError for a source that is not there or holds nothing readable.
    """
    from sidlm.data.config import parse_source
    from sidlm.data.sources import find_shards

    found = {}
    for source in (*cfg.data.train, *cfg.data.valid):
        if parse_source(source).location.startswith("hf:"):
            continue
        paths = [Path(path) for shard in find_shards(source, cfg.data) for path in shard.paths]
        found[source] = {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    return found


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

"""A training run as one nested, frozen dataclass, read from a YAML file and dotted command-line settings.

`load_config("configs/x.yaml", ["--optim.lr", "1e-3"])`: the file's settings and then the command line's go through the
same parser, so both take the same values and give the same errors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from sidlm.data.config import DataConfig
from sidlm.errors import SidError
from sidlm.parallel.config import ParallelConfig
from sidlm.train.recipe import RecipeConfig, phases
from sidlm.train.schedule import ScheduleConfig
from sidlm.train.settings import (
    apply_settings,
    argv_settings,
    format_overrides,
    parse_overrides,
    print_help,
    yaml_settings,
)
from sidlm.train.spikes import SpikeConfig
from sidlm.train.steps import StepRange

_overrides_spec = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME=VALUE ...",
    instance_from_str=parse_overrides,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=format_overrides,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model: a preset, and changes to it; or the one in a folder."""

    preset: str = "nano"
    """size: nano, micro, mini, small, 1b, 3b, 8b, 70b, 405b"""
    arch: Literal["sid", "llama"] = "sid"
    """sid: every fourth layer 2-simplicial; llama: plain causal attention everywhere"""
    init_from: str = ""
    """folder of a model, or of its run, whose weights the run starts from; preset and arch are then not used, and the
    tokenizer is the folder's unless data.tokenizer names another"""
    overrides: Annotated[dict[str, Any], tyro.conf.arg(name="set"), _overrides_spec] = field(default_factory=dict)
    """fields of the model's config that differ from the preset; in YAML a mapping named `overrides`, on the command
    line `--model.set num_hidden_layers=6 simplicial_window=[64,8]`, which adds to those of the file"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, or Muon for the matrices of the blocks."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices take orthogonalised momentum steps of the size of AdamW's, so lr and weight_decay stay
    as they are; embedding, head, norms, routers and experts stay with AdamW"""
    muon_momentum: float = 0.95
    """momentum of Muon"""
    lr: float = 1e-3
    """peak learning rate"""
    down_proj_lr_scale: float = 1.0
    """learning rate of the last matrices of feed-forward layers, in multiples of lr; squared ReLU may want 0.1"""
    embedding_lr_scale: float = 1.0
    """learning rate of the embedding, in multiples of lr; small models with a head of their own learn sooner with 10"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay of weights with two or more dimensions (embeddings included); norms and biases have none"""
    clip_norm: float = 1.0
    """gradients are scaled down to this global L2 norm; 0 switches clipping off"""


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """2:4 activation sparsity of a model with mlp_sparsity "2:4"; without effect on any other."""

    warmup_steps: int = 1000
    """first optimizer steps, done with dense activations; 0 = sparse from the start"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    out: str = "runs/nano"
    """run folder; started again with the same folder, a run goes on from its newest good checkpoint"""
    resume: Literal["auto", "never"] = "auto"
    """never: refuse a folder that already holds a run"""
    steps: int = 200
    """optimizer steps in all; the learning-rate schedule depends on it"""
    batch_size: int = 16
    """rows of data.seq_len tokens in one optimizer step"""
    micro_batch_size: int = 0
    """rows of a process in one forward and backward pass, 0 = all, or one with parallel.pp; the loss does not depend
    on it"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast over fp32 weights; auto: bf16 on CUDA, fp32 on a CPU"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    recompute: Literal["none", "cheap", "blocks"] = "none"
    """what the backward pass computes again to save memory: none; cheap, what costs no matrix product; blocks, all but
    the inputs of blocks"""
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    """products of the inner blocks' linear layers in float8, through torchao: scaled by the largest value of a tensor,
    which is fastest, or of each row; emulated where the device has no such products"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on for CUDA, off for a CPU"""
    seed: int = 0
    """initial weights and the order of the data"""
    log_every: int = 10
    """steps between progress lines where there is no terminal (metrics.jsonl has every step)"""
    layer_stats_every: int = 0
    """steps between statistics of each layer's output and each parameter's gradient, in metrics.jsonl; 0 = never"""
    profile: StepRange = field(default_factory=StepRange)
    """steps of which each process writes a chrome trace to OUT/profile"""
    memory_snapshot: StepRange = field(default_factory=StepRange)
    """steps of which each process writes the history of its GPU memory to OUT/memory"""
    wandb: str = ""
    """project on Weights & Biases that gets what TensorBoard gets; needs the extra wandb; WANDB_MODE=offline is kept"""
    verify_every: int = 10
    """steps between comparisons, bit for bit, of what replicas (parallel.dp_replicate) hold and, of all processes, of
    the size of their own gradients; state is also compared before each checkpoint; 0 = never"""
    verify_recompute_every: int = 0
    """steps between those that are computed twice and compared bit for bit, each process with itself; 0 = those that
    are suspicious"""
    watchdog_seconds: float = 300.0
    """of several processes, all end with a diagnosis when a step takes longer than this and ten times as long as any
    before, so that torchrun starts them again; six times as long for the first step, validation, checkpoints and
    exports; 0 = never"""
    max_skipped: int = 100
    """give up after this many steps in all whose loss or gradient was not finite; such steps change nothing"""
    max_skipped_in_a_row: int = 10
    """give up after this many such steps in a row"""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save."""

    every: int = 100
    """steps between checkpoints; one is also written at the end and on Ctrl-C or SIGTERM; 0 = only then"""
    keep: int = 2
    """newest checkpoints to keep"""
    keep_every: int = 0
    """also keep those of every so many steps, 0 = none"""
    keep_best: int = 0
    """also keep this many with the lowest validation loss"""
    max_failed: int = 3
    """give up after more than this many in a row that could not be written, as on a full disk; the last one of a run
    must be written"""
    export_every: int = 0
    """steps between exports of the model to OUT/model (safetensors), each from a checkpoint that is written for it; it
    is always exported at the end; 0 = only then"""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out documents during the run."""

    every: int = 100
    """steps between validations, also done at the end; 0 = never"""
    documents: int = 64
    """at most this many documents, spread evenly over the domains"""
    characters: int = 20_000
    """at most this many characters of each document"""
    batch_size: int = 8
    """rows in one forward pass"""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Texts the model writes, kept in samples.jsonl and shown in the report."""

    every: int = 0
    """steps between samples, 0 = only at the end"""
    prompts: tuple[str, ...] = ("Once upon a time", "The most important", "def main(")
    """texts to continue; empty = no samples"""
    max_new_tokens: int = 64
    """tokens to write after each prompt"""
    temperature: float = 0.8
    """0 = always the most likely token"""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Train a language model. Give a YAML file first, then settings that override it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """which model"""
    data: DataConfig = field(default_factory=DataConfig)
    """which text"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer"""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """batch, row length and mix by tokens"""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """loss spikes"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """learning-rate schedule"""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """2:4 activation sparsity"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """how the processes that torchrun starts share the work"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """when to save"""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """loss on held-out text"""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """texts the model writes"""


def load_config(path: str | Path | None, argv: Sequence[str] = ()) -> RunConfig:
    """RunConfig of a YAML file (None: the defaults), changed by `--dotted.key value ...` settings.

    Raises SidError with one line for an unreadable file, an unknown key (naming the nearest one), a value of the
    wrong type, or a combination that cannot run. `--help` in argv prints help and raises SystemExit(0).
    """
    cfg = RunConfig()
    if path is not None:
        cfg = apply_settings(cfg, yaml_settings(RunConfig, path), where=f"{path}: ")
    if any(word in ("--help", "-h") for word in argv):
        print_help(cfg, "sid train [CONFIG.yaml]")
        raise SystemExit(0)
    cfg = apply_settings(cfg, argv_settings(RunConfig, argv))
    check(cfg)
    return cfg


def check(cfg: RunConfig) -> None:
    """Raise SidError for values that no run can have, naming the key and the value."""
    at_least = {
        "train.steps": 1, "train.batch_size": 1, "train.micro_batch_size": 0, "train.log_every": 1,
        "train.max_skipped": 0, "train.max_skipped_in_a_row": 0, "train.watchdog_seconds": 0,
        "train.layer_stats_every": 0, "train.profile.start": 1, "train.profile.steps": 0,
        "train.memory_snapshot.start": 1, "train.memory_snapshot.steps": 0,
        "train.verify_every": 0, "train.verify_recompute_every": 0,
        "checkpoint.every": 0, "checkpoint.keep": 1,
        "checkpoint.keep_every": 0, "checkpoint.keep_best": 0, "checkpoint.max_failed": 0,
        "checkpoint.export_every": 0, "validation.every": 0, "validation.documents": 1, "validation.characters": 1,
        "validation.batch_size": 1,
        "samples.every": 0, "samples.max_new_tokens": 1, "samples.temperature": 0, "optim.eps": 0,
        "spikes.threshold": 0, "spikes.window": 2, "spikes.max_in_a_row": 0, "spikes.max_total": 0,
        "schedule.cosine_steps": 0, "schedule.anneal_tokens": 0, "schedule.average_every": 0,
        "optim.weight_decay": 0, "optim.clip_norm": 0, "schedule.warmup_steps": -1, "schedule.floor": 0,
        "sparsity.warmup_steps": 0, "data.seq_len": 1,
    }  # fmt: skip
    flat = flatten(cfg)
    for key, low in at_least.items():
        if not flat[key] >= low:
            raise SidError(f"{key} must be at least {low}, got {flat[key]}")
    for key in ("optim.lr", "optim.down_proj_lr_scale", "optim.embedding_lr_scale"):
        if not flat[key] > 0:
            raise SidError(f"{key} must be above 0, got {flat[key]}")
    for key in ("optim.beta1", "optim.beta2", "optim.muon_momentum"):
        if not 0 <= flat[key] < 1:
            raise SidError(f"{key} must be in [0, 1), got {flat[key]}")
    if cfg.schedule.floor > 1:
        raise SidError(f"schedule.floor is a fraction of optim.lr and must be at most 1, got {cfg.schedule.floor}")
    if cfg.train.micro_batch_size and cfg.train.batch_size % cfg.train.micro_batch_size:
        raise SidError(
            f"train.batch_size={cfg.train.batch_size} is not a multiple of "
            f"train.micro_batch_size={cfg.train.micro_batch_size}"
        )
    if cfg.schedule.average_every and not cfg.schedule.anneal_tokens:
        raise SidError("schedule.average_every averages over the annealing: it needs schedule.anneal_tokens")
    if cfg.train.wandb and importlib.util.find_spec("wandb") is None:
        raise SidError(f"train.wandb={cfg.train.wandb}: wandb is not installed here; pip install 'sidlm[wandb]'")
    phases(cfg)
    if cfg.schedule.warmup_steps >= cfg.train.steps > 1:
        warmup, steps = cfg.schedule.warmup_steps, cfg.train.steps
        raise SidError(f"schedule.warmup_steps={warmup} leaves nothing of train.steps={steps}")


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses as {"optim.lr": 0.001, ...}; `model.overrides.NAME` for each changed model field."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):
            flat |= {f"{prefix}{f.name}.{key}": item for key, item in value.items()}
        else:
            flat[prefix + f.name] = value
    return flat


def to_yaml(cfg: Any) -> str:
    """The config as YAML that load_config reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(cfg)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

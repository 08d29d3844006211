"""Context extension: stages of ever longer rows, each of which has to pass a gate before the next one begins.

Llama 3 went from rows of 8K to 128K tokens in six stages and about 800B tokens, and on to the next stage only when the
evaluations of short contexts had recovered completely and every needle was found at the new length (arXiv 2407.21783,
section 3.4.2). A stage here is a run of its own in OUT/stage-N, which starts from the weights of the one before;
OUT/extend.json keeps what each gate has measured, and a stage that does not pass is given its tokens again.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidlm.errors import SidError
from sidlm.train import folder, hardware, processes
from sidlm.train.config import RunConfig, check, flatten
from sidlm.train.processes import Processes
from sidlm.train.recipe import parse_change
from sidlm.train.settings import apply_settings, argv_settings, print_help, yaml_settings

Record = dict[str, Any]
SAME = ("model.init_from", "data.", "validation.documents", "validation.characters")
"""What the loss before the extension depends on"""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Stages of a context extension (`sid extend` alone), and what lets a stage pass."""

    stages: tuple[str, ...] = ()
    """TOKENS:ROWSxLENGTH, in any number: a stage trains on TOKENS tokens in steps of ROWS rows of LENGTH tokens, e.g.
    100B:1024x16384; TOKENS:ROWSxLENGTH@THETA changes the base of RoPE from this stage on"""
    attempts: int = 4
    """times that a stage is given its tokens until it passes; then the extension stops"""
    tolerance: float = 0.01
    """nats per token by which the loss of held-out text in rows of data.seq_len may lie above that of the model before
    the extension"""
    depths: int = 5
    """depths of needles, evenly from the beginning to the end of a row of the new length; all must be found"""
    repeats: int = 2
    """needles at each depth"""


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(RunConfig):
    """Extend the context of the model in model.init_from. data.seq_len is the row length that it has now; steps, batch
    and row length of the runs come from extend.stages. Give a YAML file first, then settings that override it."""

    extend: GateConfig = field(default_factory=GateConfig)
    """stages and their gate"""


@dataclass(frozen=True)
class Stage:
    """One stage as it was written, and what that says."""

    text: str
    tokens: int
    rows: int
    length: int
    theta: float | None

    @property
    def steps(self) -> int:
        """Optimizer steps that hold its tokens."""
        return math.ceil(self.tokens / (self.rows * self.length))


@dataclass(frozen=True, kw_only=True)
class ExtendResult:
    """What an extension came to."""

    record: Record
    """what is in OUT/extend.json"""
    out: Path
    """the last stage's run folder"""
    signal: int = 0
    """number of the signal that ended it early, else 0"""


def load_extension(path: str | Path | None, argv: Sequence[str] = ()) -> ExtendConfig:
    """ExtendConfig of a YAML file, changed by settings, as `load_config` does for a run; raises what it raises."""
    cfg = ExtendConfig()
    if path is not None:
        cfg = apply_settings(cfg, yaml_settings(ExtendConfig, path), where=f"{path}: ")
    if any(word in ("--help", "-h") for word in argv):
        print_help(cfg, "sid extend CONFIG.yaml")
        raise SystemExit(0)
    cfg = apply_settings(cfg, argv_settings(ExtendConfig, argv))
    read_stages(cfg)
    return cfg


def read_stages(cfg: ExtendConfig) -> list[Stage]:
    """The stages of a config. Raises SidError for what cannot be one, or no extension, naming it."""
    gate, found = cfg.extend, []
    for key, low in (("attempts", 1), ("tolerance", 0), ("depths", 1), ("repeats", 1)):
        if not getattr(gate, key) >= low:
            raise SidError(f"extend.{key} must be at least {low}, got {getattr(gate, key)}")
    if not gate.stages:
        raise SidError("extend.stages is empty: give TOKENS:ROWSxLENGTH, e.g. 100B:1024x16384")
    if not cfg.model.init_from:
        raise SidError("model.init_from is empty: name the folder of the model whose context is to be extended")
    if cfg.recipe.batch:
        raise SidError("recipe.batch and extend.stages both say how long rows are: leave recipe.batch out")
    length = cfg.data.seq_len
    for text in gate.stages:
        what, at, theta = text.partition("@")
        tokens, (rows, new) = parse_change("extend.stages", what, "TOKENS:ROWSxLENGTH[@THETA]", "x", 2)
        if tokens < 1 or rows < 1 or rows % 1 or new % 1:
            raise SidError(f"extend.stages: {text!r} must have whole numbers above 0 of tokens and rows")
        if new <= length:
            raise SidError(f"extend.stages: {text!r} has rows of {new:.0f} tokens, no longer than {length} before it")
        try:
            base = float(theta) if at else None
        except ValueError as error:
            raise SidError(f"extend.stages: {text!r} has {theta!r} as RoPE's base, which is no number") from error
        length = int(new)
        found.append(Stage(text, tokens, int(rows), length, base))
    return found


def extend(cfg: ExtendConfig, *, say: Callable[[str], None] = print) -> ExtendResult:
    """Extend a model's context, or go on where the extension in cfg.train.out is.

    Started by torchrun, all processes call it, and each stage is spread over them as cfg.parallel says, and so is the
    model that a gate measures.
    Raises SidError if a stage has not passed after extend.attempts, naming what failed with the numbers; and what
    `train` raises. Everything done stays, and the same call goes on from it.
    """
    stages, out = read_stages(cfg), Path(cfg.train.out)
    first = short_run(cfg)
    with processes.started(first) as group, folder.locked(out) if group.first else nullcontext():
        record = group.told(read_record(cfg, stages, first) if group.first else None)
        assert record is not None
        if "before" not in record:
            record["before"] = measured(first, group)
            if group.first:
                write_record(out, record)
        for number, stage in enumerate(stages, 1):
            entry = record["stages"][number - 1]
            source = cfg.model.init_from if number == 1 else str(out / f"stage-{number - 1}")
            while not entry["passed"]:
                failed = reasons(entry["gates"][-1], record, cfg) if entry["gates"] else ["no gate yet"]
                if failed and len(entry["gates"]) >= cfg.extend.attempts:
                    raise SidError(stopped(number, stage, entry, failed))
                if failed:
                    run = stage_run(cfg, stage, number, source, attempt=len(entry["gates"]) + 1)
                    signal = train_stage(run, group)
                    if signal:
                        return ExtendResult(record=record, out=Path(run.train.out), signal=signal)
                    entry["gates"].append(gate_of(cfg, run, stage, group))
                    failed = reasons(entry["gates"][-1], record, cfg)
                entry["passed"] = not failed
                if group.first:
                    write_record(out, record)
                    say(told(number, stage, entry, record, failed))
    return ExtendResult(record=record, out=out / f"stage-{len(stages)}")


def short_run(cfg: ExtendConfig, out: Path | None = None, source: str = "") -> RunConfig:
    """The config as a run in rows of the old length, of a stage's model if `out` and `source` name one."""
    run = RunConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(RunConfig)})
    return dataclasses.replace(
        run,
        model=dataclasses.replace(cfg.model, init_from=source or cfg.model.init_from),
        train=dataclasses.replace(cfg.train, out=str(out or cfg.train.out)),
    )


def stage_run(cfg: ExtendConfig, stage: Stage, number: int, source: str, *, attempt: int) -> RunConfig:
    """The run of a stage, which starts from the model in `source` and has the tokens of so many attempts."""
    from sidlm.models.convert.source import read_config
    from sidlm.train.build import start_folder

    before = read_config(start_folder(source), cfg.model.overrides)
    overrides = dict(cfg.model.overrides)
    overrides["max_position_embeddings"] = max(before.max_position_embeddings, stage.length)
    if stage.theta is not None:
        overrides["rope_parameters"] = dict(before.rope_parameters or {}) | {"rope_theta": stage.theta}
    run = short_run(cfg, Path(cfg.train.out) / f"stage-{number}", source)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, overrides=overrides),
        data=dataclasses.replace(cfg.data, seq_len=stage.length),
        train=dataclasses.replace(
            run.train,
            steps=attempt * stage.steps,
            batch_size=stage.rows,
            seed=cfg.train.seed + number,  # its documents come in an order of their own
        ),
    )
    check(run)
    return run


def train_stage(run: RunConfig, group: Processes) -> int:
    """Train a stage, or go on with it; the number of the signal that ended it early, else 0."""
    from sidlm.train import loop

    gc.collect()  # the shards of what was before must be gone
    if group.mesh is not None:
        processes.check_rows(run)
    return loop.train_in(run, group).signal


def gate_of(cfg: ExtendConfig, run: RunConfig, stage: Stage, group: Processes) -> Record:
    """What the gate measures of a stage's model: held-out loss in short rows, and needles found at the new length."""
    short = short_run(cfg, Path(run.train.out), run.train.out)
    return {"tokens": run.train.steps * stage.rows * stage.length} | measured(short, group, stage.length, cfg.extend)


def measured(run: RunConfig, group: Processes, length: int = 0, gate: GateConfig | None = None) -> Record:
    """{"loss": nats per token, "bits_per_byte"} of held-out text by the model in run.model.init_from, in rows of
    run.data.seq_len; and {"recall", "depth 0.00", ...} of needles in rows of `length` tokens. The model is spread over
    the processes as in training, and all of them call this."""
    from sidlm.evaluate.needle import needle_recall, needles, reader_of
    from sidlm.parallel.reading import Reader
    from sidlm.train.build import build_model, open_text
    from sidlm.train.observe import observing, validate

    gc.collect()  # as in train_stage
    device = processes.local_device(run)
    precision = hardware.resolve_precision(run.train.precision, device)
    with group.in_turn():
        text = open_text(run, resumed=not group.first, log=None)
    if not text.valid:
        raise SidError("the gate needs held-out text, and there is none: give data.valid or data.valid_fraction")
    plain = dataclasses.replace(  # with the products of evaluation
        run, train=dataclasses.replace(run.train, float8="off", recompute="none", compile="off")
    )
    model, pipeline = build_model(plain, text.tokenizer, group.mesh, device, precision)
    reader = Reader(model, group.mesh, pipeline)
    found = validate(reader, text, run, precision)["all"]
    record: Record = {name: found[name] for name in ("loss", "bits_per_byte")}
    if gate is not None:
        hidden = needles(text.tokenizer, length, depths=gate.depths, repeats=gate.repeats)
        with observing(reader, precision):
            record["needles"] = needle_recall(reader_of(reader), hidden)
    return record


def check_needles(run: RunConfig, stages: list[Stage]) -> None:
    """Raise SidError for a stage whose rows are too short for a needle, before anything is trained."""
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.evaluate.needle import needles
    from sidlm.train.build import start_folder

    tokenizer = Tokenizer.load(Path(run.data.tokenizer or start_folder(run.model.init_from)))
    for stage in stages:
        needles(tokenizer, stage.length, depths=1, repeats=1)


def reasons(gate: Record, record: Record, cfg: ExtendConfig) -> list[str]:
    """Why a gate is not passed, with the numbers; empty if it is."""
    found, before = [], record["before"]["loss"]
    if not gate["loss"] <= before + cfg.extend.tolerance:
        found.append(
            f"the loss in rows of {cfg.data.seq_len} tokens is {gate['loss']:.4f}, which was {before:.4f} before the "
            f"extension and may be {before + cfg.extend.tolerance:.4f} (extend.tolerance {cfg.extend.tolerance})"
        )
    if gate["needles"]["recall"] < 1:
        low = {name: share for name, share in gate["needles"].items() if share < 1 and name != "recall"}
        at = ", ".join(f"{100 * share:.0f}% at {name}" for name, share in low.items())
        found.append(f"{100 * gate['needles']['recall']:.0f}% of the needles are found ({at}), all must be")
    return found


def stopped(number: int, stage: Stage, entry: Record, failed: list[str]) -> str:
    """The one line of an extension that does not go on."""
    gates = entry["gates"]
    return (
        f"stage {number} ({stage.length} tokens) has not passed its gate after {len(gates)} attempts and "
        f"{gates[-1]['tokens']:,} tokens: {'; '.join(failed)}; raise extend.attempts to go on"
    )


def told(number: int, stage: Stage, entry: Record, record: Record, failed: list[str]) -> str:
    """A line on a gate."""
    gate = entry["gates"][-1]
    what = "passed" if not failed else f"not passed: {'; '.join(failed)}; going on"
    return (
        f"stage {number}: {stage.length} tokens a row, after {gate['tokens']:,} tokens loss {gate['loss']:.4f} "
        f"({record['before']['loss']:.4f} before), needles {100 * gate['needles']['recall']:.0f}%: gate {what}"
    )


def read_record(cfg: ExtendConfig, stages: list[Stage], run: RunConfig) -> Record:
    """What OUT/extend.json holds, with an entry for each stage; a new extension has no "before" yet.

    Raises SidError if it is the record of another model, of other text, or of other stages up to the last one begun.
    """
    path = Path(cfg.train.out) / "extend.json"
    check_needles(run, stages)
    same = {key: value for key, value in flatten(run).items() if key.startswith(SAME)}
    same = json.loads(json.dumps(same))  # as it is read again
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        record = {"short_length": cfg.data.seq_len, "settings": same, "stages": []}
    _refuse_other(record, same, stages, path)
    entries = record["stages"][: len(stages)]
    for number, stage in enumerate(stages[len(entries) :], len(entries) + 1):
        entries.append({"stage": stage.text, "folder": f"stage-{number}", "passed": False, "gates": []})
    for entry, stage in zip(entries, stages, strict=True):
        entry["stage"] = stage.text
    record["stages"] = entries
    if "before" in record:
        write_record(path.parent, record)
    return record


def _refuse_other(record: Record, same: Record, stages: list[Stage], path: Path) -> None:
    old = record["settings"]
    differing = [
        f"{key} is {old.get(key, 'not set')} there and {same.get(key, 'not set')} here"
        for key in sorted(old.keys() | same.keys())
        if key not in folder.FREE and old.get(key) != same.get(key)
    ]
    texts = [stage.text for stage in stages]
    for number, entry in enumerate(record["stages"], 1):
        here = texts[number - 1] if number <= len(texts) else "not there"
        if entry["passed"] and here != entry["stage"]:
            differing.append(f"stage {number}, which has passed, is {entry['stage']} there and {here} here")
    if differing:
        raise SidError(f"{path} is of another extension: {'; '.join(differing)}; choose another train.out")


def write_record(out: Path, record: Record) -> None:
    """Write OUT/extend.json, whole or not at all."""
    folder.write_text(out / "extend.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

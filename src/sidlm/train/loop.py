"""The training loop. Read `run` from top to bottom: it is all there is to training a language model.

Everything that could change a number is a pure function of the config and the step: the initial weights come from
train.seed, the batch of a step from (seed, step), the learning rate and whether activations are sparse from the step.
So a run that was killed and goes on from a checkpoint computes, in fp32 on a CPU, bit for bit what it would have
computed without.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidlm import __version__
from sidlm.errors import SidError
from sidlm.models.flops import num_parameters
from sidlm.parallel.reading import Reader
from sidlm.train import checkpoint, folder, hardware, processes, sparsity
from sidlm.train.average import Average
from sidlm.train.build import build_model, open_text
from sidlm.train.config import RunConfig, check, to_yaml
from sidlm.train.export import describe_model, export_model
from sidlm.train.health.monitor import Health
from sidlm.train.integrity import Integrity
from sidlm.train.layers import LayerStatistics
from sidlm.train.ledger import Ledger, summary
from sidlm.train.metrics import NoLog, RunLog, finite
from sidlm.train.observe import validate, write_samples
from sidlm.train.optim import make_optimizer, optimizer_tensors, set_learning_rate
from sidlm.train.processes import Processes
from sidlm.train.ranklog import RankLog
from sidlm.train.recipe import anneal_steps
from sidlm.train.report import write_report
from sidlm.train.saving import Saver
from sidlm.train.schedule import learning_rate
from sidlm.train.signals import StopSignals
from sidlm.train.speed import SpeedMeter
from sidlm.train.spikes import SpikeGuard
from sidlm.train.stragglers import Pace
from sidlm.train.trace import Tracer
from sidlm.train.train_step import Watch, train_step

if TYPE_CHECKING:
    from sidlm.data.loader import Batch
    from sidlm.data.phases import PhasedLoader
    from sidlm.models.config import SidConfig


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    step: int
    """optimizer steps done"""
    loss: float | None
    """training loss of the last step, nats per token; None if no step was done in this process or it was skipped"""
    valid: dict[str, dict[str, float]]
    """last validation: {"all" or domain: {"loss": nats per token, "bits_per_byte": ...}}"""
    tokens: int
    """tokens seen since step 0"""
    tokens_per_second: float
    """of this process's steps, without the first one, validation and checkpoints"""
    peak_memory: int
    """bytes: allocated on CUDA, resident in the process elsewhere"""
    out: Path
    """the run folder"""
    signal: int = 0
    """number of the signal that ended the run early, else 0"""


@dataclass
class RunState:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    valid: dict[str, dict[str, float]] = field(default_factory=dict)
    spikes: dict[str, Any] = field(default_factory=dict)


def train(cfg: RunConfig, *, on_step: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train, or go on training, the run in cfg.train.out.

    on_step: called with each step's record (see metrics.py) after it was written.
    Started by torchrun, all processes call it and share the work as cfg.parallel says; the first one writes.
    Raises SidError for anything a user can mend; the newest checkpoint stays intact in every case.
    """
    check(cfg)
    with processes.started(cfg) as group:
        return train_in(cfg, group, on_step)


def train_in(cfg: RunConfig, group: Processes, on_step: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """`train` in processes that have been started, and may train several runs one after the other."""
    with folder.locked(Path(cfg.train.out)) if group.first else nullcontext():
        found = group.told(folder.find_resume(cfg) if group.first else None)
        out = Path(cfg.train.out)
        with (
            Health(out, group, cfg.train.watchdog_seconds) as health,
            RankLog(out, group.rank) as words,
            Ledger(out if group.first else None, found.step if found is not None else 0) as ledger,
        ):
            return run(cfg, group, found, health, words, ledger, on_step)


def run(
    cfg: RunConfig,
    group: Processes,
    found: checkpoint.Checkpoint | None,
    health: Health,
    words: RankLog,
    ledger: Ledger,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> TrainResult:
    """What `train` does, in one of its processes."""
    out = Path(cfg.train.out)
    device = processes.local_device(cfg)
    precision = hardware.resolve_precision(cfg.train.precision, device)

    with group.in_turn():
        ready = found is not None or not group.first
        text = open_text(cfg, resumed=ready, share=group.share, log=print if group.first else None)
    torch.manual_seed(cfg.train.seed)
    model, pipeline = build_model(cfg, text.tokenizer, group.mesh, device, precision, resumed=found is not None)
    reader = Reader(model, group.mesh, pipeline)
    optimizer = make_optimizer(model, cfg.optim, group.mesh)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}
    state, annealing = RunState(), cfg.train.steps - anneal_steps(cfg)
    average: Average | None = None
    if found is not None and cfg.schedule.average_every and found.step > annealing:
        average = Average(model, annealing, cfg.schedule.average_every)
        tensors |= average.tensors
    if found is not None:
        checkpoint.load(found, tensors)
        state = restore_state(found, text.fingerprint)
    guard = SpikeGuard(cfg.spikes)
    guard.state |= state.spikes
    state.spikes = guard.state
    sparse = sparsity.sparse_layers(model)

    meter = SpeedMeter(model, cfg, hardware.peak_flops(device, precision), group.count)
    stop = StopSignals()
    loss: float | None = None
    total_steps, log_every = cfg.train.steps, cfg.train.log_every
    if group.first:
        folder.describe_run(cfg, hardware.environment(device) | meter.facts() | group.facts(precision))
        log = RunLog(
            out, step=state.step, total_steps=total_steps, log_every=log_every, note=words.note, wandb=cfg.train.wandb
        )
        words.merge()
    else:
        log = NoLog(words.note)

    def not_saved(problem: str) -> None:
        log.say(problem)
        health.survived("disk", problem)

    saver = Saver(out / "checkpoints", cfg.checkpoint, group, not_saved)
    integrity = Integrity(
        model, [] if pipeline is None else pipeline.stages, group, every=cfg.train.verify_every,
        recompute_every=cfg.train.verify_recompute_every, say=log.say,
    )  # fmt: skip
    layers, pace = LayerStatistics(model, group), Pace(model, group, device)
    watch = Watch(integrity, layers, pace)
    tracer = Tracer(out, group.rank, device, cfg.train.profile, cfg.train.memory_snapshot, log.say)

    def export(step: int) -> None:
        write = partial(export_model, generation=model.generation_config, tokenizer=text.tokenizer)
        saver.export(step, out / "model", num_parameters(model.config) * 4, write)

    def at(phase: str, step: int | None = None) -> None:
        health.at(phase, step)
        ledger.at(phase, step)

    with stop, log, saver, health.noted():
        for line in health.before:
            log.say(f"an earlier start ended: {line}")
        log.say(headline(cfg, model, device, precision, meter, state, group))
        if sparsity.present(model):
            log.say(sparsity.announcement(model.config.num_hidden_layers, cfg.sparsity, total_steps))
        started = time.perf_counter()
        health.at("step", state.step + 1)
        ledger.at("data")
        for step, batch in prefetched(text.loader, state.step, total_steps, pin=device.type == "cuda"):
            lr = learning_rate(
                step, cfg.schedule, peak=cfg.optim.lr, total_steps=total_steps, anneal_steps=total_steps - annealing
            )
            set_learning_rate(optimizer, lr)
            ledger.at("step", step + 1)
            tracer.at(step + 1)
            sparsity.switch(sparse, step, cfg.sparsity)
            last = step + 1 == total_steps
            measuring = cfg.train.layer_stats_every > 0 and due(step + 1, cfg.train.layer_stats_every, last)
            integrity.begin(step + 1)
            layers.begin(measuring)
            loss, norm, spike = train_step(
                model, optimizer, batch, cfg, device, precision, group, pipeline, guard, watch, step
            )
            if cfg.schedule.average_every and step >= annealing:
                if average is None:
                    average = Average(model, annealing, cfg.schedule.average_every)
                    tensors |= average.tensors
                average.update(step)

            tokens = batch.tokens.numel() * group.share[1]
            state.step = step + 1
            state.tokens += tokens
            record: dict[str, Any] = {"step": state.step, "loss": finite(loss), "lr": lr, "grad_norm": finite(norm)}
            speed = meter.measure(tokens, time.perf_counter() - started, batch.tokens.shape[1])
            record |= {"tokens": state.tokens} | speed
            pace.step_done(speed["seconds"], tokens, speed["mfu"])
            if count_skipped(state, loss, norm):
                record["skipped"] = f"the loss is {loss}, the gradient norm {norm}"
            elif spike:
                record["skipped"] = spike

            if sparsity.present(model) and due(state.step, log_every, last):
                record["sparsity"] = sparsity.measured(model, sparse, group)
            if measuring:
                record["layers"] = layers.result()
            if due(state.step, log_every, last):
                compare_ranks(pace, record, log, health)
                if group.first:
                    words.merge()
            if text.valid and cfg.validation.every and due(state.step, cfg.validation.every, last):
                at("validation")
                with in_use(average):
                    state.valid = record["valid"] = validate(reader, text, cfg, precision)
            log.record(record)
            if cfg.samples.prompts and due(state.step, cfg.samples.every, last):
                at("samples")
                with in_use(average):
                    write_samples(log, reader, text.tokenizer, cfg, precision, state.step)
            give_up_if_hopeless(state, cfg)
            stop.signal, held_up = group.largest_of([stop.signal, pace.held_up])
            if held_up:
                say_slow(*pace.judge_step(state.step), state.step, log, health)
            stopping = bool(stop.signal)
            exporting = due(state.step, cfg.checkpoint.export_every, last=False)
            saving = due(state.step, cfg.checkpoint.every, last or stopping or exporting)
            integrity.state(tensors, state.step, saving=saving)
            if saving:
                at("checkpoint")
                log.sync()
                saver.save(tensors, checkpoint_values(state, cfg, text.fingerprint, model.config))
            if exporting and not last:
                export(state.step)
            if on_step is not None and group.first:
                on_step(record)
            if stopping:
                break
            started = time.perf_counter()
            pace.resume()
            health.at("step", state.step + 1)
            ledger.at("data")
        peak_memory = hardware.peak_memory_bytes(device)
        finished = state.step == total_steps
        at("export")
        if finished:
            export(state.step)
        tracer.at(0)
        saver.finish(last=True)
        ledger.at("report")
        if not finished:
            ledger.cause = f"signal {stop.signal}"
        if group.first:
            log.say(summary(out).line())

    if finished and group.first:
        write_report(out, {"peak_memory": peak_memory, "tokens_per_second": meter.tokens_per_second})
    return TrainResult(
        step=state.step, loss=None if loss is None else finite(loss), valid=state.valid, tokens=state.tokens,
        tokens_per_second=meter.tokens_per_second, peak_memory=peak_memory, out=out,
        signal=0 if finished else stop.signal,
    )  # fmt: skip


def compare_ranks(pace: Pace, record: dict[str, Any], log: RunLog | NoLog, health: Health) -> None:
    """The speed of each process into the record, and a line once one is slow, or is no longer."""
    numbers, line, rank = pace.report()
    if numbers is not None:
        record["ranks"] = numbers
    say_slow(line, rank, record["step"], log, health)


def say_slow(line: str | None, rank: int, step: int, log: RunLog | NoLog, health: Health) -> None:
    """On the first process: a line on which process is slow, or that none is any more (rank -1)."""
    if line is not None and health.group.first:
        log.say(f"step {step}: {line}")
        if rank >= 0:
            health.survived("slow", line, ranks=[rank], step=step)


def in_use(average: Average | None) -> AbstractContextManager[None]:
    """The mean of the weights in the model, once there is one."""
    return nullcontext() if average is None else average.in_use()


def prefetched(loader: PhasedLoader, first: int, end: int, *, pin: bool) -> Iterator[tuple[int, Batch]]:
    """(step, batch) for the steps first..end-1; a thread prepares the next batch during the step.

    pin: whether in memory from which copies to a GPU need no waiting.
    """

    def prepare(step: int) -> Batch:
        batch = loader.batch(step)
        return batch.pinned() if pin else batch

    with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
        following = pool.submit(prepare, first) if first < end else None
        for step in range(first, end):
            assert following is not None
            batch = following.result()
            following = pool.submit(prepare, step + 1) if step + 1 < end else None
            yield step, batch


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every `every` steps (0: only at the end) happens after `step`."""
    return last or (every > 0 and step % every == 0)


def count_skipped(state: RunState, loss: float, norm: float) -> bool:
    """Keep the counts; True if the step was skipped."""
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    state.skipped += skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    return skipped


def give_up_if_hopeless(state: RunState, cfg: RunConfig) -> None:
    """Raise SidError once more steps were skipped than the config allows; no checkpoint is written any more."""
    for name, count in (("max_skipped_in_a_row", state.skipped_in_a_row), ("max_skipped", state.skipped)):
        if count > getattr(cfg.train, name):
            raise SidError(
                f"stopped at step {state.step}: the loss or gradient was not finite in {count} steps "
                f"(train.{name}={getattr(cfg.train, name)}); the checkpoints in {cfg.train.out} are intact: "
                "lower optim.lr or look at the data"
            )


def checkpoint_values(state: RunState, cfg: RunConfig, data_fingerprint: str, model: SidConfig) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return dataclasses.asdict(state) | {
        "data": data_fingerprint, "config": to_yaml(cfg), "model": describe_model(model), "version": __version__,
    }  # fmt: skip


def restore_state(found: checkpoint.Checkpoint, data_fingerprint: str) -> RunState:
    """The state in a checkpoint. Raises SidError if the data is no longer what the run has been reading."""
    if found.state["data"] != data_fingerprint:
        raise SidError(
            f"{found.path} was trained on other data or with another tokenizer (fingerprint "
            f"{found.state['data'][:12]}, now {data_fingerprint[:12]}): restore the files, or choose another train.out"
        )
    return RunState(**{f.name: found.state[f.name] for f in dataclasses.fields(RunState) if f.name in found.state})


def headline(
    cfg: RunConfig, model: Any, device: torch.device, precision: str, meter: Any, state: Any, group: Processes
) -> str:
    """One line on what is about to happen."""
    parameters = num_parameters(model.config)
    start = f"from step {state.step}" if state.step else "new run"
    kind = f"started from {cfg.model.init_from}" if cfg.model.init_from else f"{cfg.model.preset}/{cfg.model.arch}"
    return (
        f"{cfg.train.out}: {kind}, {parameters / 1e6:.2f}M parameters, "
        f"{precision} on {group.describe(device)}, {cfg.train.batch_size} x {cfg.data.seq_len} tokens a step, {start}; "
        f"peak: {meter.peak.source}"
    )

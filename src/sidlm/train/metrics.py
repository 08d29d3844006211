"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

Record = dict[str, Any]
BOARD_RANKS = 64
"""Up to how many processes TensorBoard shows each one's speed; metrics.jsonl has all"""


def finite(value: float) -> float | None:
    """The number, or None where JSON has no name for it (nan, inf)."""
    return value if math.isfinite(value) else None


class JsonLines:
    """An append-only file of one JSON object for each line; lines past `step` are dropped when it is opened.

    A line that a killed process left half written is dropped too. The rewrite is atomic.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.is_file():
            kept = [line for line in read_json_lines(path) if line["step"] <= step]
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one object; it survives a kill of this process from here on."""
        self.file.write(_line(record))
        self.file.flush()

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never knows more steps than this file."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_json_lines(path: Path) -> list[Record]:
    """The objects of a JSON-lines file. A torn last line is left out; any other unreadable line too, with a warning."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            warnings.warn(f"{path}, line {number} is unreadable and left out: {error}", stacklevel=2)
    return records


class RunLog:
    """All the outputs of a run's numbers. A record is {"step", "loss", "lr", ...}, with "valid" and "sparsity" where
    they were measured.

    step: steps done before this process. note: takes each line for the log of all ranks. wandb: see train.wandb. Use it
    as a context manager.
    """

    def __init__(
        self, out: Path, *, step: int, total_steps: int, log_every: int, note: Callable[[str], None], wandb: str = ""
    ) -> None:
        self.metrics = JsonLines(out / "metrics.jsonl", step)
        self.samples = JsonLines(out / "samples.jsonl", step)
        self.board = _tensorboard(out / "tensorboard", step)
        self.progress = Progress(step, total_steps, log_every, note)
        self.wandb = _wandb(wandb, out) if wandb else None

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.metrics.close()
        self.samples.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))

    def record(self, record: Record) -> None:
        """Write one step everywhere."""
        self.metrics.write(record)
        self.progress.update(record)
        if self.board is not None:
            for name, value in _scalars(record):
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(dict(_scalars(record)), step=record["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keep a text the model wrote."""
        self.samples.write({"step": step, "prompt": prompt, "text": text})
        if self.board is not None:
            self.board.add_text(prompt, text.replace("<", "&lt;"), step)

    def sync(self) -> None:
        self.metrics.sync()
        self.samples.sync()

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        self.progress.say(line)


class NoLog:
    """The log of a process that writes no numbers. note: takes each line for the log of all ranks."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def record(self, record: Record) -> None:
        pass

    def sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def say(self, line: str) -> None:
        self.note(line)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional: metrics.jsonl has it all
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _wandb(project: str, out: Path) -> Any:
    """The run of this folder, the same one after a restart."""
    import wandb  # pyright: ignore[reportMissingImports]

    place = out / "wandb-id.txt"
    if not place.is_file():
        place.write_text(secrets.token_hex(4), encoding="utf-8")
    config = (out / "config.yaml").read_text(encoding="utf-8")
    return wandb.init(
        project=project, name=out.name, id=place.read_text(encoding="utf-8"), resume="allow", dir=str(out),
        config=yaml.safe_load(config),
    )  # fmt: skip


def _scalars(record: Record) -> list[tuple[str, float]]:
    names = {"loss": "loss/train", "lr": "lr", "grad_norm": "grad_norm", "tokens_per_second": "speed/tokens_per_second",
             "mfu": "speed/mfu"}  # fmt: skip
    scalars = [(name, record[key]) for key, name in names.items() if record.get(key) is not None]
    for domain, numbers in record.get("valid", {}).items():
        scalars += [(f"valid_{key}/{domain}", numbers[key]) for key in ("loss", "bits_per_byte")]
    for name, layers in record.get("sparsity", {}).items():
        scalars += [(f"sparsity_{name}/layer_{i}", value) for i, value in enumerate(layers) if value is not None]
    for kind, statistics in record.get("layers", {}).items():
        for key, values in statistics.items():
            named = values.items() if isinstance(values, dict) else ((f"layer_{i}", v) for i, v in enumerate(values))
            scalars += [(f"{kind}_{key}/{name}", value) for name, value in named if value is not None]
    for key, values in record.get("ranks", {}).items():
        if len(values) <= BOARD_RANKS:
            scalars += [(f"rank_{key}/rank_{rank}", value) for rank, value in enumerate(values)]
    return scalars


class Progress:
    """A live bar on a terminal; elsewhere a plain line every `log_every` steps. Speed is the mean of recent steps."""

    def __init__(self, step: int, total_steps: int, log_every: int, note: Callable[[str], None]) -> None:
        self.note = note
        self.first, self.step, self.total, self.log_every = step, step, total_steps, log_every
        self.recent: deque[tuple[float, int, float | None]] = deque(maxlen=20)
        self.bar: Any = None

    def start(self) -> None:
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("[bold]train"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}"),
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=self.total, completed=self.step, info="", eta="-")
        self.bar.start()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        self.note(line)
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: Record) -> None:
        self.step = record["step"]
        if record["seconds"] and (self.step > self.first + 1 or self.step == self.total):  # the first one warms up
            self.recent.append((record["seconds"], record["step_tokens"], record["mfu"]))
        info, eta = self._info(record), self._eta()
        line = None
        if self.step % self.log_every == 0 or self.step in (self.first + 1, self.total):
            line = f"step {self.step:>{len(str(self.total))}}/{self.total}  {info}  ETA {eta}"
            self.note(line)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.step, info=info, eta=eta)
        elif line is not None:
            print(line, flush=True)
        if record.get("skipped"):
            self.say(f"step {self.step}: {record['skipped']}; step skipped")
        if "valid" in record:
            total = record["valid"]["all"]
            self.say(f"step {self.step}: valid loss {total['loss']:.4f}, {total['bits_per_byte']:.4f} bits per byte")

    def _info(self, record: Record) -> str:
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        parts = [f"loss {loss}", f"lr {record['lr']:.2e}"]
        seconds = sum(s for s, _, _ in self.recent)
        if seconds:
            parts.append(f"{sum(t for _, t, _ in self.recent) / seconds:,.0f} tok/s")
            mfu = sum(s * (m or 0.0) for s, _, m in self.recent) / seconds
            parts.append(f"MFU {100 * mfu:.1f}%")
        return "  ".join(parts)

    def _eta(self) -> str:
        if not self.recent:
            return "-"
        left = (self.total - self.step) * sum(s for s, _, _ in self.recent) / len(self.recent)
        hours, rest = divmod(round(left), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

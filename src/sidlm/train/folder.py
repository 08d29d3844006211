"""The run folder: one process at a time, one config for one folder, and the files that say what ran."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sidlm.errors import SidError
from sidlm.train import checkpoint
from sidlm.train.config import RunConfig, flatten, load_config, to_yaml
from sidlm.train.recipe import phases

# what a checkpoint cannot be continued with when it differs: the weights' shapes and the order of the data
FIXED = ("model.", "data.", "train.seed", "train.batch_size")
FREE = ("data.cache_dir", "data.skip_corrupt")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the run folder and hold it, so that two processes never write to one run. Raises SidError if it is held.

    The lock belongs to the process and goes with it, however it ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+")
    except OSError as error:
        raise SidError(f"cannot write to the run folder {out}: {error.strerror}") from error
    with file:
        _lock(file, out)
        try:
            yield
        except OSError as error:
            if not checkpoint.is_disk_full(error):
                raise
            free = shutil.disk_usage(out).free
            raise SidError(
                f"no disk space in the run folder {out}: {free:,} bytes free; its checkpoints are intact"
            ) from error


def _lock(file: IO[str], out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise SidError(f"run folder {out} is in use by process {file.read().strip() or '?'}") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def find_resume(cfg: RunConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, or None for a new run.

    Raises SidError when the folder's run may not be continued (train.resume=never), has another model, data, seed or
    batch size (naming each key with both values), or has checkpoints of which none is intact.
    """
    out, folder = Path(cfg.train.out), Path(cfg.train.out) / "checkpoints"
    checkpoint.clean_up(folder)
    checkpoint.clean_up(out)
    if not any(folder.glob("step-*")):
        return None
    if cfg.train.resume == "never":
        raise SidError(f"{out} already holds a run and train.resume is never: choose another train.out")
    if (out / "config.yaml").is_file():
        _refuse_other_run(cfg, load_config(out / "config.yaml"), out)
    found = checkpoint.newest_good(folder, warn=warn)
    if found is not None and (out / "config.yaml").is_file():
        _refuse_other_past(cfg, load_config(out / "config.yaml"), out, found.step)
    if found is None:
        raise SidError(f"no checkpoint in {folder} is intact: restore one, or choose another train.out")
    if found.step > cfg.train.steps:
        raise SidError(f"{found.path} is beyond train.steps={cfg.train.steps}: choose more steps or another train.out")
    return found


def _refuse_other_run(cfg: RunConfig, old: RunConfig, out: Path) -> None:
    new, before = flatten(cfg), flatten(old)
    differing = [
        f"{key} is {before.get(key, 'not set')} there and {new.get(key, 'not set')} here"
        for key in sorted(new.keys() | before.keys())
        if key.startswith(FIXED) and key not in FREE and new.get(key) != before.get(key)
    ]
    if differing:
        raise SidError(f"{out} holds another run: {'; '.join(differing)}; choose another train.out to start a new one")


def _refuse_other_past(cfg: RunConfig, old: RunConfig, out: Path, step: int) -> None:
    """A change of batch or mix may be added, moved or dropped as long as it lies ahead of `step`."""
    new, before = ([p for p in phases(c) if p.first_step < max(step, 1)] for c in (cfg, old))
    if new != before:
        raise SidError(
            f"{out} is at step {step}, and recipe.batch and recipe.mix say otherwise there and here of the steps "
            f"before it: {list(old.recipe.batch + old.recipe.mix)} and {list(cfg.recipe.batch + cfg.recipe.mix)}"
        )


def describe_run(cfg: RunConfig, environment: dict[str, Any]) -> None:
    """Write config.yaml, environment.json and add this start to command.txt."""
    out = Path(cfg.train.out)
    write_text(out / "config.yaml", to_yaml(cfg))
    write_text(out / "environment.json", json.dumps(environment, indent=1) + "\n")
    with (out / "command.txt").open("a", encoding="utf-8") as file:
        file.write(f"# {datetime.now(UTC).isoformat(timespec='seconds')}\n{shlex.join(sys.argv)}\n")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or, when killed, leave the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def warn(message: object) -> None:
    """One line on stderr."""
    print(f"sid: warning: {message}", file=sys.stderr, flush=True)

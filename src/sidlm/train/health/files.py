"""The files in OUT/health, which are all that is left of processes that died.

    start-0003/rank-2.json        the beat of a process: where it is, and when that was
    start-0003/rank-2.note.json   what it met before it failed, else blank
    start-0003/rank-2.hang.json   what it waited for when the watchdog ended the run, .hang.txt for people
    start-0003/rank-2.stacks.txt  its Python stacks, when another process asked for them by SIGUSR2
    history.jsonl                 a diagnosis for each start that ended badly, and what was survived

Beats and notes have their place on the disk from the start on and are written over in place: a full disk cannot
silence them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import IO, Any

SIZE = 4096
"""Bytes of a beat or a note; longer ones lose the end of their texts"""

KEPT = 10
"""Newest starts whose files are kept"""

Record = dict[str, Any]


def health_folder(out: Path) -> Path:
    return out / "health"


def starts(out: Path) -> list[tuple[int, Path]]:
    """(number, folder) of the starts of a run whose files are there, oldest first."""
    folder = health_folder(out)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"start-(\d{4,})", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def new_start(out: Path) -> Path:
    """A folder for a start; those of old ones go."""
    before = starts(out)
    for _, path in before[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    last = max([number for number, _ in before] + [record["start"] for record in history(out)], default=0)
    folder = health_folder(out) / f"start-{last + 1:04d}"
    folder.mkdir(parents=True)
    return folder


class Place:
    """SIZE bytes on the disk for one JSON object, taken at once. Nothing here raises: health must not end a run."""

    def __init__(self, path: Path) -> None:
        self.lock = threading.Lock()
        self.file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self.file = path.open("wb", buffering=0)
            self.file.write(b" " * SIZE)

    def write(self, record: Record) -> None:
        text = json.dumps(record)
        if len(text) > SIZE:
            text = json.dumps({key: value[:200] if isinstance(value, str) else value for key, value in record.items()})
        if self.file is not None and len(text) <= SIZE:
            with self.lock, contextlib.suppress(OSError):
                self.file.seek(0)
                self.file.write(text.encode().ljust(SIZE))

    def close(self) -> None:
        with self.lock:
            if self.file is not None:
                self.file.close()
            self.file = None


def write(path: Path, record: Record) -> None:
    """A whole file at once. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> Record | None:
    """The object in a file, None where there is none (yet)."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return None


def read_ranks(folder: Path, kind: str) -> dict[int, Record]:
    """{rank: record} of the files rank-N<kind>.json of a start; kind "" for beats, ".note", ".hang"."""
    found = {}
    for path in folder.glob(f"rank-*{kind}.json"):
        match = re.fullmatch(rf"rank-(\d+){re.escape(kind)}\.json", path.name)
        record = read(path) if match else None
        if match and record is not None:
            found[int(match[1])] = record
    return dict(sorted(found.items()))


def history(out: Path) -> list[Record]:
    """The diagnoses of a run, oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for line in (health_folder(out) / "history.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def add_history(out: Path, record: Record) -> bool:
    """Append a line as a whole, or, on a full disk, nothing; whether it was written."""
    path = health_folder(out) / "history.jsonl"
    text = (json.dumps(record) + "\n").encode()
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            whole = file.write(text) == len(text)
        except OSError:
            whole = False
        if not whole:
            file.truncate(end)
        return whole
    return False

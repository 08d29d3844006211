"""OUT/log.txt: what all processes said, in one file, with the time, the ranks and the level of each line.

Each process appends to OUT/log/rank-N.txt at once, so nothing is lost with it. The first one puts what is new into
log.txt, where the same line of many ranks is one: `2026-01-31 12:00:00 ranks 0-3 WARNING ...`. What a start that was
killed left behind is put there by the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any


class RankLog(logging.Handler):
    """One process's lines: what is said by `note`, and warnings of Python and of libraries. A context manager."""

    def __init__(self, out: Path, rank: int) -> None:
        super().__init__(logging.WARNING)
        self.out, self.rank = out, rank
        self.folder = out / "log"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"rank-{rank}.txt").open("a", encoding="utf-8")
        self.show: Any = None

    def __enter__(self) -> RankLog:
        logging.getLogger().addHandler(self)
        self.show, warnings.showwarning = warnings.showwarning, self._warned
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.note(f"{type(error).__name__}: {error}", "ERROR")
        logging.getLogger().removeHandler(self)
        warnings.showwarning = self.show
        self.file.close()
        if self.rank == 0:
            self.merge()

    def note(self, text: str, level: str = "INFO") -> None:
        """Keep a line."""
        moment = datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a line after the end
            self.file.write(f"{moment} {level} {' '.join(text.split())}\n")
            self.file.flush()

    def emit(self, record: logging.LogRecord) -> None:
        self.note(f"{record.name}: {record.getMessage()}", record.levelname)

    def _warned(self, message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        self.note(f"{category.__name__}: {message}", "WARNING")
        self.show(message, category, *where, **more)

    def merge(self) -> None:
        """On the first process: put what is new in the files of all ranks into OUT/log.txt."""
        with contextlib.suppress(OSError):
            offsets = _read(self.folder / "merged.json")
            lines = []
            for path in self.folder.glob("rank-*.txt"):
                done = offsets.get(path.name, 0)
                if path.stat().st_size > done:
                    with path.open("rb") as file:
                        file.seek(done)
                        new = file.read()
                    new = new[: new.rfind(b"\n") + 1]
                    offsets[path.name] = done + len(new)
                    rank = int(path.stem.removeprefix("rank-"))
                    lines += [(rank, line) for line in new.decode("utf-8", "replace").splitlines()]
            if lines:
                with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in folded(lines))
                temporary = self.folder / "merged.json.tmp"
                temporary.write_text(json.dumps(offsets), encoding="utf-8")
                temporary.replace(self.folder / "merged.json")


def _read(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def folded(lines: Iterable[tuple[int, str]]) -> list[str]:
    """(rank, "date time LEVEL text") as lines in the order of time; equal texts of several ranks are one line."""
    found: dict[tuple[str, str, int], tuple[str, list[int]]] = {}
    seen: dict[tuple[int, str, str], int] = {}
    for rank, line in sorted(lines, key=lambda item: item[1][:23]):
        match = re.fullmatch(r"(\S+ \S+) (\S+) (.*)", line)
        if match is None:
            continue
        moment, level, text = match.groups()
        # the second time that a rank says it is another line
        count = seen[rank, level, text] = seen.get((rank, level, text), 0) + 1
        found.setdefault((level, text, count), (moment[:19], []))[1].append(rank)
    return [
        f"{moment} {'ranks' if len(ranks) > 1 else 'rank'} {spans(ranks)} {level} {text}"
        for (level, text, _), (moment, ranks) in found.items()
    ]


def spans(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

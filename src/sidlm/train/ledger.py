"""What the time of a run went into, over all its starts: OUT/ledger.jsonl (Llama 3, section 3.3.4 and table 5).

One line each second or phase, appended and flushed, so that a kill costs at most the last one. Lines:

    {"event": "start", "time": ..., "step": steps done in the checkpoint that it goes on from}
    {"event": "spent", "time": ..., "step": newest step, "seconds": {phase: seconds since the line before}}
    {"event": "end", "time": ..., "cause": "finished", "signal 15", or an error}
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sidlm.errors import SidError
from sidlm.train.health import files

PHASES = {
    "step": "training steps",
    "repeated": "steps done again after a restart",
    "restart": "from the end of one start to the next",
    "start": "start: data, model, checkpoint",
    "first step": "first step: compilation, first allocations",
    "data": "waiting for data",
    "validation": "validation",
    "samples": "samples",
    "checkpoint": "checkpoints, the part that training waits for",
    "export": "exports, the part that training waits for",
    "report": "report",
}
"""What a second can go into; only "step" is effective training time"""


class Ledger:
    """The book of a start, a context manager; `at` says what the run turns to.

    out: the run folder, or None on processes that keep no book. step: done when it begins.
    """

    def __init__(self, out: Path | None, step: int) -> None:
        now = time.time()
        self.cause = "finished"
        self.file: TextIO | None = None
        self.highest = 0
        if out is not None:
            self.highest = max((line["step"] for line in read(out) if line["event"] == "spent"), default=0)
            with contextlib.suppress(OSError):
                self.file = (out / "ledger.jsonl").open("a", encoding="utf-8")
                self.file.write("\n" if self.file.tell() else "")  # what a killed start left half written ends here
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase, self.since, self.written, self.step = "start", now, now, step
        self.first_step = step + 1
        self._write({"event": "start", "time": now, "step": step})

    def at(self, phase: str, step: int | None = None) -> None:
        """A phase begins: one of health's, or data. step: the one in work, counted from 1."""
        now = time.time()
        self.seconds[self.phase] += now - self.since
        self.since = now
        if phase == "step" and step is not None:
            self.step = step
            phase = "first step" if step == self.first_step else "repeated" if step <= self.highest else "step"
        self.phase = phase
        if now - self.written >= 1.0 or phase in ("report", "end"):
            self._spent(now)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.at("end")
        now = time.time()
        cause = self.cause if error is None else str(error) if isinstance(error, SidError) else repr(error)
        self._write({"event": "end", "time": now, "cause": cause[:500]})
        if self.file is not None:
            self.file.close()

    def _spent(self, now: float) -> None:
        seconds = {phase: round(value, 4) for phase, value in self.seconds.items()}
        self._write({"event": "spent", "time": now, "step": self.step, "seconds": seconds})
        self.seconds.clear()
        self.written = now

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the run
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's ledger without half written ones; [] where there is none."""
    found = []
    with contextlib.suppress(OSError):
        for line in (out / "ledger.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


@dataclass
class Summary:
    """Sums over all starts of a run."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    interruptions: list[dict[str, Any]] = field(default_factory=list)
    """{"cause", "line": what is known of it, "lost": seconds until training was where it had been}"""

    @property
    def elapsed(self) -> float:
        return sum(self.seconds.values())

    @property
    def effective(self) -> float:
        """Share of the elapsed time that was useful training."""
        return self.seconds["step"] / self.elapsed if self.elapsed else 0.0

    def causes(self) -> dict[str, tuple[int, float]]:
        """{cause: (interruptions, seconds lost)}, the costliest first."""
        found: dict[str, tuple[int, float]] = {}
        for one in self.interruptions:
            count, lost = found.get(one["cause"], (0, 0.0))
            found[one["cause"]] = (count + 1, lost + one["lost"])
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def line(self) -> str:
        """All of it in one line."""
        parts = [
            f"{phase} {100 * seconds / self.elapsed:.1f}%"
            for phase, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])
            if phase != "step" and self.elapsed and seconds / self.elapsed >= 0.0005
        ]
        lost = [f"{count} {cause} ({seconds:.0f} s)" for cause, (count, seconds) in self.causes().items()]
        count = len(self.interruptions)
        after = f"; {count} interruption{'s' if count > 1 else ''}: {', '.join(lost)}" if lost else ""
        return (
            f"effective training time {100 * self.effective:.1f}% of {self.elapsed:.1f} s"
            f"{' (' + ', '.join(parts) + ')' if parts else ''}{after}"
        )


def summary(out: Path) -> Summary:
    """Add up OUT/ledger.jsonl. What ended a start is its own last line or, of one that died, health's diagnosis."""
    found, history = Summary(), files.history(out)
    last: dict[str, Any] | None = None
    open_interruption: dict[str, Any] | None = None
    for line in read(out):
        if line["event"] == "start" and last is not None:
            open_interruption = None
            if last.get("cause") != "finished":  # else somebody wanted more steps, some day
                gap = max(0.0, line["time"] - last["time"])
                found.seconds["restart"] += gap
                cause, words = _cause(last, line, history)
                open_interruption = {"cause": cause, "line": words, "lost": gap}
                found.interruptions.append(open_interruption)
        elif line["event"] == "spent":
            for phase, seconds in line["seconds"].items():
                found.seconds[phase] = found.seconds.get(phase, 0.0) + seconds
                if open_interruption is not None and phase in ("start", "first step", "repeated"):
                    open_interruption["lost"] += seconds
        last = line
    return found


def _cause(last: dict[str, Any], following: dict[str, Any], history: list[dict[str, Any]]) -> tuple[str, str]:
    """(category, line) of what happened between the last line of one start and the first of the next."""
    said = last.get("cause", "")
    if said.startswith("silent corruption"):
        return "silent corruption", said
    known = [h for h in history if last["time"] - 60 <= h["time"] <= following["time"] and not h.get("survived")]
    if known:
        return known[-1]["kind"], known[-1]["line"]
    if said.startswith("signal"):
        return "stopped by a signal", said
    return ("error", said) if said else ("killed", "the start ended without a word")

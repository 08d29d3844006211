"""Looking at some steps of a run closely: a profile of each process, and the history of its GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sidlm.train.steps import StepRange


class Tracer:
    """OUT/profile/rank-N.json, a chrome trace, and OUT/memory/rank-N.pickle, for pytorch.org/memory_viz."""

    def __init__(
        self, out: Path, rank: int, device: torch.device, profile: StepRange, memory: StepRange,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.out, self.rank, self.device, self.say = out, rank, device, say
        self.profile, self.memory = profile, memory
        self.profiler: Any = None
        self.recording = False

    def at(self, step: int) -> None:
        """Step `step` begins; 0: none any more."""
        if self.profiler is not None and step not in self.profile:
            self._end_profile()
        elif self.profiler is None and step in self.profile:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
            self.profiler.start()
        if self.recording and step not in self.memory:
            self._end_memory()
        elif not self.recording and step in self.memory:
            self.recording = True
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            elif step == self.memory.start:
                self.say(f"train.memory_snapshot needs CUDA: the memory of {self.device.type} has no history")

    def _end_profile(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.profiler.stop()
        path = self._path("profile", "json")
        self.profiler.export_chrome_trace(str(path))
        self.profiler = None
        self.say(f"profile of {_steps(self.profile)}: {path.parent}")

    def _end_memory(self) -> None:
        self.recording = False
        if self.device.type == "cuda":
            path = self._path("memory", "pickle")
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"memory of {_steps(self.memory)}: {path.parent}")

    def _path(self, name: str, kind: str) -> Path:
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        return folder / f"rank-{self.rank}.{kind}"


def _steps(of: StepRange) -> str:
    return f"steps {of.start} to {of.start + of.steps - 1}"

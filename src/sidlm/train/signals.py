"""SIGINT and SIGTERM end a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from sidlm.parallel.config import launched


class StopSignals:
    """Turns the first SIGINT or SIGTERM into `signal`, to be looked at between steps; the second one acts as usual.

    Not so under torchrun, which sends one again at once to those that the terminal sent it, and kills in the end.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.patient = launched()
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self.patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is not None and self.signal and self.patient:
            signal.raise_signal(self.signal)  # torchrun ends what failed with another process: now, not after a wait

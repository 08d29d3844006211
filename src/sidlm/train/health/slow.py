"""Which process made a step slow: the one that came to its collectives after the others.

Only a step that took much longer than usual is looked at: then each process writes when it came to the collectives of
that step, and the first one adds up how much later than the earliest each was. A healthy run pays nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from sidlm.train.health import dump, files

NOTED, SLOW = 1.5, 2.0
"""Times the usual duration from which a step's arrivals are written, and from which they are judged"""

LEAST = 1.0
"""Seconds beyond the usual that are worth a line; half of it for arrivals to be written"""

KNOWN = 5
"""Steps until it is known what is usual"""

GAP = 5.0
"""Seconds between two looks at slow steps"""

PATIENCE = 10.0
"""Seconds that the first process waits for what the others write"""


class SlowStep(NamedTuple):
    step: int
    began: float
    seconds: float
    usual: float


class Slowness:
    """One process's memory of how long steps take."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self.recent: deque[float] = deque(maxlen=64)
        self.pending: SlowStep | None = None
        self.looked = 0.0
        self.judged: SlowStep | None = None
        """by the first process, once the others have written"""

    def done(self, step: int, began: float, seconds: float) -> None:
        """A step took so long."""
        usual = statistics.median(self.recent) if len(self.recent) >= KNOWN else seconds
        noted = seconds > max(NOTED * usual, usual + LEAST / 2)
        if self.processes > 1 and noted and self.pending is None and time.time() > self.looked + GAP:
            self.pending = SlowStep(step, began, seconds, usual)
        self.recent.append(seconds)

    def write(self, folder: Path) -> None:
        """In the thread: leave this process's arrivals for the first one. Raises OSError."""
        slow, self.pending = self.pending, None
        if slow is None:
            return
        self.looked = time.time()
        found = dump.collectives(last=1000)
        inside = [c for c in found if slow.began <= c["time"] <= slow.began + slow.seconds]
        arrivals = {f"{c['group']} {c['ranks']} {c['number']} {c['name']}": c["time"] for c in inside}
        files.write(folder / f"rank-{self.rank}.slow.json", {"step": slow.step, "arrivals": arrivals})
        if slow.seconds > max(SLOW * slow.usual, slow.usual + LEAST):
            self.judged = slow

    def judge(self, folder: Path, beats: dict[int, Any]) -> tuple[int, int, str] | None:
        """In the first process's thread: (rank, step, line) of the process that made the step slow, once all have
        written; None while they have not, and if it was not one process."""
        slow = self.judged
        if slow is None:
            return None
        found = {
            rank: record for rank, record in files.read_ranks(folder, ".slow").items() if record["step"] == slow.step
        }
        if len(found) < self.processes:
            if time.time() > self.looked + PATIENCE:
                self.judged = None
            return None
        self.judged = None
        late = lateness({rank: record["arrivals"] for rank, record in found.items()})
        rank = max(late, key=lambda one: late[one])
        if late[rank] < (slow.seconds - slow.usual) / 2:
            return None
        who = f"rank {rank} ({beats[rank]['host']}, pid {beats[rank]['pid']})"
        line = f"{who} is slow: it came {late[rank]:.2f} s after the others to the collectives of step {slow.step}, "
        line += f"which took {slow.seconds:.2f} s, usual is {slow.usual:.2f} s"
        return rank, slow.step, line


def lateness(arrivals: dict[int, dict[str, float]]) -> dict[int, float]:
    """{rank: seconds after the earliest, added up over the collectives}, of {rank: {collective: Unix time}}.

    Of a collective that one process alone has recorded nothing is known.
    """
    late = dict.fromkeys(arrivals, 0.0)
    for name in set().union(*arrivals.values()):
        times = {rank: own[name] for rank, own in arrivals.items() if name in own}
        for rank, moment in times.items():
            late[rank] += moment - min(times.values())
    return late

"""The other processes on this machine, by what /proc says of them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """A process of a run."""

    rank: int
    pid: int
    host: str
    machine: str
    """of equal ones, pids mean the same; "" where there is no /proc"""

    @property
    def here(self) -> bool:
        return bool(self.machine) and self.machine == machine()


@functools.cache
def machine() -> str:
    """This boot and this namespace of pids."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def this(rank: int) -> Peer:
    return Peer(rank, os.getpid(), socket.gethostname(), machine())


def state(pid: int) -> tuple[str, int | None]:
    """(letter of the process state, wait status of a dead one): R, S, D, T for stopped, Z for dead and not yet
    collected, "" for gone; the status is None where it can no longer be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", None
    letter = fields[0]
    return (letter, int(fields[-1])) if letter in "ZX" else (letter, None)


def gone(pid: int) -> dict[str, str | int | None] | None:
    """None for a process that lives; of a dead one {"signal": its name, or None, "status": exit status, or None}."""
    letter, status = state(pid)
    if letter not in ("", "Z", "X"):
        return None
    if status is None:
        return {"signal": None, "status": None}
    if not os.WIFSIGNALED(status):
        return {"signal": None, "status": os.WEXITSTATUS(status)}
    return {"signal": signal.Signals(os.WTERMSIG(status)).name, "status": None}

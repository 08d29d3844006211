"""Faults for benchmarks/chaos.py: a schedule from a seed, and what a training process does to itself when it is due.

A fault is due when its process begins its step for the first time; a file FOLDER/fired-INDEX, made before it strikes,
holds the moment and the step and keeps it from striking again after a restart.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("kill", "stop", "hang", "slow", "flip", "disk", "cut", "reset")
"""SIGKILL; SIGSTOP; an endless sleep in Python; slow for some steps; a bit of a gradient; a full disk; packets dropped
on all connections of a process; its connections closed"""


@dataclass(frozen=True)
class Fault:
    """One fault."""

    index: int
    kind: str
    step: int
    rank: int
    delay: float
    """seconds into the step, for what strikes from outside"""
    bit: int
    """of a gradient's first 32-bit number that is not 0"""


def schedule(seed: int, counts: dict[str, int], *, first: int, gap: int, ranks: int) -> list[Fault]:
    """The faults in random order, one each `gap` steps or one or two more, in random processes."""
    rng = random.Random(seed)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(kinds)
    faults, step = [], first
    for index, kind in enumerate(kinds):
        rank = 0 if kind == "disk" else rng.randrange(ranks)
        faults.append(Fault(index, kind, step, rank, round(rng.uniform(0.0, 0.2), 3), rng.randrange(20, 31)))
        step += gap + rng.randrange(3)
    return faults


class Injector:
    """Strikes in the process of a rank. slow: seconds by which a slow process is later in each of slow_steps steps."""

    def __init__(self, faults: list[Fault], rank: int, folder: Path, disk: Path, slow: float, slow_steps: int) -> None:
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.rank, self.folder, self.disk, self.slow, self.slow_steps = rank, folder, disk, slow, slow_steps
        self.step = self.slow_until = 0
        self.flip: Fault | None = None

    def at(self, step: int) -> None:
        """A step begins."""
        self.step = step
        if self.rank == 0:
            with (self.folder / "steps.log").open("a") as file:
                file.write(f"{time.time():.6f} {step}\n")
        for fault in self.faults:
            if fault.step == step and self._fire(fault):
                self._strike(fault)
        if step <= self.slow_until:
            time.sleep(self.slow)

    def _fire(self, fault: Fault) -> bool:
        try:
            (self.folder / f"fired-{fault.index}").touch(exist_ok=False)
        except FileExistsError:
            return False
        self._sign(fault)
        return True

    def _sign(self, fault: Fault) -> None:
        (self.folder / f"fired-{fault.index}").write_text(json.dumps({"time": time.time(), "step": self.step}))

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "hang":
            time.sleep(3600)
        elif fault.kind == "slow":
            self.slow_until = fault.step + self.slow_steps - 1
        elif fault.kind == "flip":
            self.flip = fault
        elif fault.kind == "disk":
            fill(self.disk)
        else:
            threading.Timer(fault.delay, self._from_outside, (fault,)).start()

    def _from_outside(self, fault: Fault) -> None:
        self._sign(fault)
        strike_from_outside(fault.kind)

    @contextlib.contextmanager
    def flipping(self, model: Any) -> Iterator[None]:
        """Flip the bit that is due while gradients are computed in the body: of odd faults before the reduction, in the
        gradient of the embedding's output, of even ones after it, in what this process holds of a parameter's."""
        fault, self.flip = self.flip, None
        if fault is None:
            yield
        elif fault.index % 2:

            def flip(gradient: Any) -> Any:
                flip_bit(gradient := gradient.clone(), fault.bit)
                return gradient

            embedding = model.get_input_embeddings()
            hook = embedding.register_forward_hook(lambda module, given, output: output.register_hook(flip) and None)
            yield
            hook.remove()
        else:
            yield
            flip_bit(next(p.grad for p in model.parameters() if p.grad is not None).to_local(), fault.bit)


def flip_bit(gradient: Any, bit: int) -> None:
    """In place, of the first number that is not 0."""
    import torch

    first = gradient.flatten().nonzero()[0, 0]
    gradient.view(torch.int32).view(-1)[first] ^= 1 << bit


def strike_from_outside(kind: str) -> None:
    """Kill or stop this process, or cut its connections."""
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
        return
    for opened in connections():
        with opened, contextlib.suppress(OSError):
            if kind == "cut":
                drop_packets(opened)
            else:
                opened.shutdown(socket.SHUT_RDWR)


def connections() -> list[socket.socket]:
    """Second handles of all TCP connections of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                opened = socket.socket(fileno=os.dup(int(name)))
                try:
                    assert opened.family in (socket.AF_INET, socket.AF_INET6) and opened.getpeername()
                    found.append(opened)
                except (OSError, AssertionError):  # not TCP, or it only listens
                    opened.close()
    return found


def drop_packets(opened: socket.socket) -> None:
    """A packet filter that lets nothing in, acknowledgements included: from both ends the path is dead."""
    attach_filter = 26  # SO_ATTACH_FILTER
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
    opened.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HL", 1, ctypes.addressof(program)))


def fill(disk: Path) -> None:
    """Write until nothing fits any more."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        break


def free(disk: Path) -> None:
    """Undo `fill`."""
    (disk / "ballast").unlink(missing_ok=True)

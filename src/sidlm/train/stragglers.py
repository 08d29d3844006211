"""Which process is slow. All of them end a step together, so what counts is the time that a process does not wait.

Measured are two parts of a step in which nobody waits for another process: the forward passes of the blocks, whose
weights are gathered before (on CUDA by events on the stream of the computation), and what Python does between the last
message of a step and the first one of the next: optimizer, data, logging. Messages of tensor or context parallelism lie
inside of a block: there all processes of one such group are as slow as their slowest.

A process is compared with its peers over the steps between two reports; and at once, over a single step, if it finds
that it alone took as long for its part as a whole step usually takes.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sidlm.nn.block import Block
from sidlm.train.health import dump
from sidlm.train.processes import Processes

SLOW = 1.3
"""Times the median of its peers from which on a process is called slow"""
IN_A_ROW = 2
"""Intervals for which it must have been"""
LEAST = 1.0
"""Seconds by which a process must hold up a single step"""
KNOWN = 3
"""Steps until it is known how long one usually takes"""


class Pace:
    """One process's part. `pause` before the first message of a step, `resume` behind the last one."""

    def __init__(self, model: nn.Module, group: Processes, device: torch.device) -> None:
        self.group = group
        self.stage = 0 if group.mesh is None else group.mesh.get_local_rank("pp")
        self.cuda = device.type == "cuda"
        self.warm = False
        self.since: float | None = None
        self.seconds, self.own = 0.0, 0.0
        """by itself: in this step, and in those since the last report"""
        self.steps, self.wall, self.tokens, self.used = 0, 0.0, 0, 0.0
        self.usual: deque[float] = deque(maxlen=64)
        self.last, self.held_up = 0.0, False
        """seconds by itself in the last step, and whether that was as much as a whole step usually takes"""
        self.reached = ""
        """in such a step the collective that it came to late"""
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.begun: Any = None
        self.slow: tuple[int, int] = (-1, 0)
        """which process, for how many intervals"""
        self.named = -1
        if group.count > 1:
            for block in model.modules():
                if isinstance(block, Block):  # behind FSDP's own hooks: the weights are there
                    block.register_forward_pre_hook(self._begin)
                    block.register_forward_hook(self._end)

    def _begin(self, block: Block, *_: Any) -> None:
        if not block.training:  # a validation is no part of a step
            return
        if self.cuda:
            self.begun = torch.cuda.Event(enable_timing=True)
            self.begun.record()
        else:
            self.begun = time.perf_counter()

    def _end(self, block: Block, *_: Any) -> None:
        if not block.training:
            return
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.events.append((self.begun, end))
        else:
            self.seconds += time.perf_counter() - self.begun

    def resume(self) -> None:
        """From here on the process is on its own."""
        self.since = time.perf_counter()

    def pause(self) -> None:
        """From here on it may wait for others."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None

    def step_done(self, seconds: float, tokens: int, mfu: float) -> None:
        """A step is over. tokens: of the whole batch. mfu: of this process in it."""
        # the device was waited for in the step: its events are over
        own = self.seconds + sum(a.elapsed_time(b) for a, b in self.events if b.query()) / 1000
        self.seconds, self.events = 0.0, []
        if not self.warm:  # what compiles is slow everywhere
            self.warm = True
            return
        usual = statistics.median(self.usual) if len(self.usual) >= KNOWN else seconds
        # who is known to be slow is not looked at each time
        self.held_up = self.group.count > 1 and own > max(LEAST, usual) and self.named != self.group.rank
        self.reached = reached_late(seconds) if self.held_up else ""
        self.last = own
        self.usual.append(seconds)
        self.own += own
        self.steps += 1
        self.wall += seconds
        self.tokens += tokens
        self.used += mfu * seconds

    def report(self) -> tuple[dict[str, list[float]] | None, str | None, int]:
        """(numbers of all processes since the last report, by rank; a line if another process is slow now, or none any
        more; its rank or -1), the same on all processes. Tokens are shared out evenly, speeds are by each process's
        own clock."""
        if self.group.count == 1 or not self.steps:
            return None, None, -1
        tokens_per_second, mfu = self.tokens / self.group.count / self.wall, self.used / self.wall
        steps, wall = self.steps, self.wall
        rows = self.group.numbers([self.own / steps, tokens_per_second, mfu, float(self.stage)])
        self.own, self.steps, self.wall, self.tokens, self.used = 0.0, 0, 0.0, 0, 0.0
        local, speeds, mfus, stages = (list(column) for column in zip(*rows, strict=True))
        line, rank = self._judge(local, stages, steps, wall / steps)
        return {"local_seconds": local, "tokens_per_second": speeds, "mfu": mfus}, line, rank

    def judge_step(self, step: int) -> tuple[str | None, int]:
        """Once any process has `held_up`, on all of them: (a line if one held up the last step, which was `step`; its
        rank or -1)."""
        seconds, stages = (list(column) for column in zip(*self.group.numbers([self.last, self.stage]), strict=True))
        medians = of_peers(seconds, stages)
        rank = max(range(len(seconds)), key=lambda one: seconds[one] - medians[one])
        if seconds[rank] - medians[rank] < LEAST:  # all were slow
            return None, -1
        host, reached = self.group.everyone((socket.gethostname(), self.reached))[rank]
        return (
            f"rank {rank} ({host}) is slow: it took {seconds[rank]:.2f} s by itself in step {step}, the median of its "
            f"peers is {medians[rank]:.2f} s{reached}"
        ), rank

    def _judge(self, local: list[float], stages: list[float], steps: int, wall: float) -> tuple[str | None, int]:
        medians = of_peers(local, stages)
        ratios = [seconds / median if median else 1.0 for seconds, median in zip(local, medians, strict=True)]
        worst = max(range(len(local)), key=lambda rank: ratios[rank])
        if ratios[worst] < SLOW:
            self.slow = (-1, 0)
        else:
            self.slow = (worst, self.slow[1] + 1 if self.slow[0] == worst else 1)
        now = worst if self.slow[1] >= IN_A_ROW else -1 if self.slow[0] == -1 else self.named
        if now == self.named:
            return None, now
        before, self.named = self.named, now
        if now == -1:
            return f"rank {before} is no longer slow", -1
        host = self.group.everyone(socket.gethostname())[now]
        lost = local[now] - medians[now]
        return (
            f"rank {now} ({host}) is slow: {ratios[now]:.1f}x the median of its peers over the last "
            f"{steps * IN_A_ROW} steps, {1000 * lost:.0f} ms of a step of {1000 * wall:.0f} ms"
        ), now


def of_peers(seconds: list[float], stages: list[float]) -> list[float]:
    """For each rank the median of the others of its pipeline stage, who do the same work; alone there, its own."""
    medians = []
    for rank, own in enumerate(seconds):
        peers = [s for other, s in enumerate(seconds) if stages[other] == stages[rank] and other != rank]
        medians.append(statistics.median(peers) if peers else own)
    return medians


def reached_late(within: float) -> str:
    """Of this process's collectives in the last `within` seconds the one before which it did nothing else for longest,
    as ", and came late to all_reduce #123 (dp_shard)"; "" if none was recorded."""
    now = time.time()
    recent = [entry for entry in dump.collectives(last=1000) if entry["time"] > now - within]
    begun = [now - within, *(entry["time"] for entry in recent)]
    gaps = [b - a for a, b in pairwise(begun)]
    if not gaps:
        return ""
    late = recent[gaps.index(max(gaps))]
    return f", and came late to {late['name']} #{late['number']} ({late['group']})"

"""The order in which pipeline stages compute their micro-batches (Llama 3, arXiv 2407.21783, section 3.3.2).

Each of P processes holds V virtual stages: process r has the stages r, P + r, 2P + r, ... N micro-batches in a row go
through one stage of a process before it turns to its next one: N = P is the depth-first order of Narayanan et al. 2021,
N = M (all of a batch) the breadth-first one. M may be any number. Imports no torch: a plan on paper reads it.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

from sidlm.errors import SidError

FORWARD, BACKWARD = 1, 2
"""What a forward and a backward pass of one stage take, in the simulation that finds the order"""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    backward: bool
    stage: int
    micro_batch: int


class Schedule(NamedTuple):
    """What each process does, in its order."""

    orders: list[list[Action]]
    bubble: float
    """idle time of a process over its time at work, if all stages cost the same and a backward pass two forward ones"""
    in_flight: list[int]
    """of each process: the most micro-batches, counted once for each of its stages, whose activations it holds"""


def stage_layers(layers: int, stages: int, end_layers: int) -> list[range]:
    """The layers of each stage. The embedding and the head count as `end_layers` layers each; what is left over goes to
    the stages behind the first, whose activations stay longest.

    With one, 126 layers on 128 stages are Llama 3's 405B: the first stage is the embedding, the last one the head.
    Raises SidError for more stages than parts.
    """
    parts = layers + 2 * end_layers
    if parts < stages:
        ends = f" and an embedding and a head that count as {end_layers} each" if end_layers else ""
        raise SidError(f"{stages} pipeline stages are more than the {layers} layers{ends}: lower parallel.pp")
    share, more = divmod(parts, stages)
    bounds = [0]
    for stage in range(stages):
        bounds.append(bounds[-1] + share + (1 <= stage <= more))
    # of parts to layers; a stage may hold less than what its end counts as
    bounds = [min(max(bound - end_layers, 0), layers) for bound in bounds]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


class Queues(NamedTuple):
    """The passes of any process, as (which of its stages, micro-batch): all do theirs in these two orders."""

    forwards: list[tuple[int, int]]
    backwards: list[tuple[int, int]]
    limits: list[int]
    """of each process: the most micro-batches, counted once for each of its stages, that it may hold"""


@cache
def queues(
    processes: int, virtual_stages: int, micro_batches: int, *, contiguous: int = 0, forwards_first: bool = False
) -> Queues:
    """What `make_schedule` chooses from, and all that the memory of a planned run depends on."""
    # rounds of N; what does not divide makes some of them longer by one, since a short one would leave a bubble
    count = max(1, micro_batches // (contiguous or processes))
    rounds = [range(i * micro_batches // count, (i + 1) * micro_batches // count) for i in range(count)]
    together = max(len(part) for part in rounds)
    forwards = [(v, m) for part in rounds for v in range(virtual_stages) for m in part]
    backwards = [(v, m) for part in rounds for v in reversed(range(virtual_stages)) for m in part]
    # a process may hold what has to be on its way before its first backward pass can be done, and no more
    ahead = [(virtual_stages - 1) * together + _warm_up(r, processes, virtual_stages) + 1 for r in range(processes)]
    limits = [len(forwards) if forwards_first else min(n, len(forwards)) for n in ahead]
    return Queues(forwards, backwards, limits)


def make_schedule(
    processes: int, virtual_stages: int, micro_batches: int, *, contiguous: int = 0, forwards_first: bool = False
) -> Schedule:
    """The order of all processes, for any numbers.

    contiguous: N, 0 for `processes`. forwards_first: all forward passes before the first backward one (GPipe), instead
    of a backward pass as soon as one can be done (1F1B).
    """
    forwards, backwards, limits = queues(
        processes, virtual_stages, micro_batches, contiguous=contiguous, forwards_first=forwards_first
    )
    stages = processes * virtual_stages
    orders: list[list[Action]] = [[] for _ in range(processes)]
    free = [0] * processes
    counts = [[0, 0] for _ in range(processes)]  # forward and backward passes done
    in_flight = [0] * processes
    ends: dict[Action, int] = {}

    def ready(rank: int, backward: bool) -> tuple[int, bool, Action] | None:
        """When a process can do its next pass of one kind; None where that is not known yet or must not be."""
        done, returned = counts[rank]
        if (returned if backward else done) == len(forwards):
            return None
        if not backward and done - returned >= limits[rank]:
            return None
        if backward and forwards_first and done < len(forwards):
            return None
        v, m = backwards[returned] if backward else forwards[done]
        stage = v * processes + rank
        before = stage + 1 if backward else stage - 1
        needed = [Action(False, stage, m)] if backward else []
        needed += [Action(backward, before, m)] if 0 <= before < stages else []
        if any(action not in ends for action in needed):
            return None
        return max([free[rank], *(ends[action] for action in needed)]), backward, Action(backward, stage, m)

    for _ in range(2 * len(forwards) * processes):
        # the earliest pass of all; a forward one first, which fills the pipeline up to its limit
        found = [
            (*next_pass, rank)
            for rank in range(processes)
            for kind in (True, False)
            if (next_pass := ready(rank, kind))
        ]
        start, _, action, rank = min(found)
        free[rank] = ends[action] = start + (BACKWARD if action.backward else FORWARD)
        counts[rank][action.backward] += 1
        in_flight[rank] = max(in_flight[rank], counts[rank][0] - counts[rank][1])
        orders[rank].append(action)
    work = len(forwards) * (FORWARD + BACKWARD)
    return Schedule(orders, max(free) / work - 1, in_flight)


def _warm_up(rank: int, processes: int, virtual_stages: int) -> int:
    """Forward passes of later micro-batches during the first one's way to the last process and back."""
    return (1 if virtual_stages == 1 else 2) * (processes - 1 - rank)

"""The order of micro-batches in a pipeline: complete, feasible, and with the bubble of the paper."""

import itertools
import math

import pytest

from sidlm.errors import SidError
from sidlm.parallel.schedule import Action, make_schedule, stage_layers

NUMBERS = list(itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 5, 7, 8, 11), (0, 1, 2, 5, 11), (False, True)))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_each_process_does_its_passes_once_and_in_an_order_that_comes_to_an_end(processes):
    for _, virtual, micro, contiguous, first in (n for n in NUMBERS if n[0] == processes):
        plan = make_schedule(processes, virtual, micro, contiguous=contiguous, forwards_first=first)
        for rank, order in enumerate(plan.orders):
            stages = range(rank, processes * virtual, processes)
            expected = {Action(b, s, m) for b in (False, True) for s in stages for m in range(micro)}
            assert len(order) == len(expected) and set(order) == expected
        assert run(plan.orders, processes * virtual)


def run(orders: list[list[Action]], stages: int) -> bool:
    """Whether processes that do their passes in these orders, and wait for what each pass needs, all finish."""
    done: set[Action] = set()
    queues = [list(reversed(order)) for order in orders]
    while any(queues):
        before = len(done)
        for queue in queues:
            while queue:
                backward, stage, m = queue[-1]
                neighbour = stage + 1 if backward else stage - 1
                needed = {Action(False, stage, m)} if backward else set()
                needed |= {Action(backward, neighbour, m)} if 0 <= neighbour < stages else set()
                if not needed <= done:
                    break
                done.add(queue.pop())
        if len(done) == before:
            return False
    return True


def test_the_bubble_is_that_of_the_paper_for_any_number_of_micro_batches():
    for processes, virtual, micro in itertools.product((2, 3, 4, 8), (1, 2, 3), range(2, 20)):
        if micro >= processes:
            bubble = make_schedule(processes, virtual, micro).bubble
            assert math.isclose(bubble, (processes - 1) / (virtual * micro)), (processes, virtual, micro)


def test_activations_held():
    assert make_schedule(4, 1, 12).in_flight == [4, 3, 2, 1]  # 1F1B
    assert make_schedule(4, 1, 12, forwards_first=True).in_flight == [12] * 4
    depth, breadth = (make_schedule(4, 2, 12, contiguous=n).in_flight for n in (4, 12))
    assert depth == [11, 9, 7, 5] and breadth == [19, 17, 15, 13]


def test_the_405b_is_spread_as_in_the_paper():
    layers = stage_layers(126, 16 * 8, 1)
    assert [len(part) for part in layers] == [0, *[1] * 126, 0]
    assert [len(part) for part in stage_layers(126, 16, 1)] == [7, *[8] * 14, 7]


@pytest.mark.parametrize(("layers", "stages", "ends"), [*itertools.product((1, 2, 5, 32), (1, 2, 3, 4), (0, 1, 2))])
def test_layers_are_spread_evenly(layers, stages, ends):
    if layers + 2 * ends < stages:
        with pytest.raises(SidError, match=f"{stages} pipeline stages are more than the {layers} layers"):
            stage_layers(layers, stages, ends)
        return
    parts = stage_layers(layers, stages, ends)
    assert [i for part in parts for i in part] == list(range(layers)) and len(parts) == stages
    sizes = [len(part) for part in parts]
    if ends == 0:
        assert max(sizes) - min(sizes) <= 1

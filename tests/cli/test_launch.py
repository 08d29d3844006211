"""`sid launch`: torchrun's options, and what it says of processes that fail. What processes really do:
tests/train/test_bad_input.py."""

import signal
import sys
import types

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError


@pytest.fixture
def run(monkeypatch):
    """What `run` of torchrun is called with; run.error is what it raises."""
    seen = types.SimpleNamespace(error=None, args=None)

    def fake(args):
        seen.args = args
        if seen.error is not None:
            raise seen.error

    monkeypatch.setattr(torch.distributed.run, "run", fake)
    return seen


def child(exitcode):
    failure = types.SimpleNamespace(exitcode=exitcode, pid=17, timestamp=0)
    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = {3: failure}
    return error


def test_the_command_goes_to_torchrun(sid, run):
    options = ["--nnodes", "2", "--nproc-per-node", "8", "--rdzv-endpoint", "node0:29500"]
    status, out, err = sid("launch", *options, "train", "x.yaml", "--parallel.tp", "2")
    assert (status, out, err) == (0, "", "")
    config, program, words = torch.distributed.run.config_from_args(run.args)
    assert program == sys.executable and config.nproc_per_node == 8 and config.min_nodes == 2
    assert words == ["-u", "-m", "sidlm.cli.main", "train", "x.yaml", "--parallel.tp", "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required"),
        (["--nproc-per-nod", "2", "train", "x.yaml"], "--nproc-per-nod"),
        (["--nproc-per-node", "2", "plan", "x.yaml"], "expected train or extend behind torchrun's options, got 'plan'"),
    ],
)
def test_mistakes_are_one_line(fails, run, words, said):
    assert said in fails("launch", *words) and run.args is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (child(-9), "process 3 (pid 17) was ended by SIGKILL; restarts used up: 4"),
        (child(1), "process 3 (pid 17) failed; restarts used up: 4"),
        (RendezvousConnectionError("no store"), "node0:29500: no store"),
        (ValueError("Unsupported nproc_per_node value: x"), "Unsupported nproc_per_node value: x"),
    ],
)
def test_what_ended_the_processes_is_one_line(fails, run, error, said):
    run.error = error
    line = fails("launch", "--max-restarts", "4", "--rdzv-endpoint", "node0:29500", "train", "x.yaml")
    assert line == said


def test_a_mistake_was_said_by_the_first_process(sid, run):
    run.error = child(2)
    assert sid("launch", "train", "x.yaml") == (2, "", "")
    run.error = SignalException("Process got signal: 15", signal.SIGTERM)
    assert sid("launch", "train", "x.yaml") == (143, "", "")

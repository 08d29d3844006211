"""From the files of a start to one line: which process, at which step, in which collective."""

import json

import pytest

from sidlm.train.health import files
from sidlm.train.health.diagnosis import diagnose

NOW = 1_000_000.0
EVERYONE = {"name": "all_reduce", "number": 123, "group": "dp_shard", "ranks": [0, 1, 2, 3], "done": False, "sizes": [],
            "time": NOW - 60}  # fmt: skip


def where(rank, **changes):
    beat = {"rank": rank, "pid": 100 + rank, "host": "node7", "processes": 4, "step": 57, "phase": "step"}
    return beat | {"since": NOW - 60, "time": NOW} | changes


def beat(rank, gone=None, **changes):
    return where(rank, **changes) | {"gone": gone or {}}


def note(rank, error="RuntimeError: Connection closed by peer", follows=True, lost=(), **changes):
    about = {"error": error, "follows": follows, "lost": list(lost), "collective": EVERYONE if follows else None}
    return where(rank, **changes) | about


def hang(rank, collective=EVERYONE, links=(), **changes):
    return where(rank, **changes) | {"collective": collective, "in": "step (x/y.py:3)", "links": list(links)}


def link(own, peer, unanswered=0):
    return {"own": ["10.0.0.1", own], "peer": ["10.0.0.1", peer], "open": True, "unanswered": unanswered,
            "unacknowledged": 0}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """start({kind: {rank: record}}) -> the folder of a start in which all four processes left a beat."""

    def make(**records):
        beats = {rank: beat(rank) for rank in range(4)} | records.pop("beats", {})
        for kind, of_kind in {"": beats, **{f".{name}": value for name, value in records.items()}}.items():
            for rank, record in of_kind.items():
                (tmp_path / f"rank-{rank}{kind}.json").write_text(json.dumps(record).ljust(files.SIZE))
        return tmp_path

    return make


def gone(signal="SIGKILL", status=None, time=NOW):
    return {"signal": signal, "status": status, "time": time}


def test_a_killed_process(start):
    others = {rank: note(rank) for rank in (0, 1, 3)}
    found = diagnose(start(beats={0: beat(0, {"2": gone()})}, note=others))
    assert found["kind"] == "killed" and found["ranks"] == [2] and found["step"] == 57
    assert found["line"] == (
        "rank 2 (node7, pid 102) was killed by SIGKILL at step 57, while ranks 0, 1 and 3 were in all_reduce #123 "
        "(dp_shard)"
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (gone(None), "died without a word (killed by SIGKILL or for want of memory) at step 57"),
        (gone(None, 4), "ended with status 4 and without a word at step 57"),
    ],
)
def test_a_process_that_is_gone_for_another_reason(start, how, said):
    assert said in diagnose(start(beats={0: beat(0, {"2": how})}))["line"]


def test_what_torchrun_ends_after_a_failure_is_no_cause(start):
    own = note(1, "OSError: [Errno 28] No space left on device", follows=False, time=NOW - 2)
    beats = {0: beat(0, {"1": gone("SIGTERM", time=NOW - 3), "3": gone(time=NOW)})}
    found = diagnose(start(beats=beats, note={1: own, 0: note(0)}))
    assert found["kind"] == "failed" and found["ranks"] == [1]
    assert found["line"].startswith("rank 1 (node7, pid 101) failed at step 57: OSError")


def test_the_first_death_counts(start):
    beats = {0: beat(0, {"3": gone(time=NOW + 5)}), 1: beat(1, {"2": gone(time=NOW)})}
    assert diagnose(start(beats=beats))["ranks"] == [2]


def test_a_process_that_hangs_in_python(start):
    dumps = {rank: hang(rank) for rank in (0, 1, 3)} | {2: hang(2, None, phase="validation")}
    found = diagnose(start(hang=dumps))
    assert found["kind"] == "hung" and found["ranks"] == [2]
    assert found["line"] == (
        "rank 2 (node7, pid 102) hangs in step (x/y.py:3) at step 57 in its validation and has not reached "
        "all_reduce #123 (dp_shard), in which ranks 0, 1 and 3 wait for 60 s"
    )


@pytest.mark.parametrize(
    ("state", "said"), [("T", "is stopped (state T)"), ("D", "hangs in the kernel"), ("R", "hangs at")]
)
def test_a_process_without_a_dump(start, state, said):
    found = diagnose(start(hang={rank: hang(rank) for rank in (0, 1, 3)}, state={2: {"state": state}}))
    assert found["kind"] == "hung" and found["ranks"] == [2] and said in found["line"]


def test_the_collective_is_one_that_waits_for_it(start):
    """Ranks 0 and 1 wait for each other's partners: only 3 shares a group with 2."""
    pair = EVERYONE | {"group": "dp_replicate", "number": 9, "ranks": [2, 3]}
    other = EVERYONE | {"group": "dp_replicate", "number": 9, "ranks": [0, 1]}
    found = diagnose(start(hang={0: hang(0, other), 1: hang(1, other), 3: hang(3, pair)}))
    assert found["ranks"] == [2] and "all_reduce #9 (dp_replicate), in which rank 3 waits" in found["line"]


def test_a_process_cut_off(start):
    """What 0, 1 and 3 send to 2 is not answered, nor what 2 sends."""
    ports = {0: 10, 1: 11, 3: 13}
    dumps = {r: hang(r, links=[link(p, p + 100, 3), link(p + 50, 999, 0)]) for r, p in ports.items()}
    dumps[2] = hang(2, links=[link(p + 100, p, 4) for p in ports.values()])
    found = diagnose(start(hang=dumps))
    assert found["kind"] == "network" and found["ranks"] == [2]
    assert "between rank 2 (node7, pid 102) and ranks 0, 1 and 3 is lost at step 57" in found["line"]


def test_one_path_cut(start):
    dumps = {r: hang(r) for r in range(4)}
    dumps[1], dumps[3] = hang(1, links=[link(11, 13, 3)]), hang(3, links=[link(13, 11, 0)])
    assert diagnose(start(hang=dumps))["ranks"] == [1, 3]


def test_collectives_that_do_not_meet(start):
    dumps = {r: hang(r) for r in (0, 1, 3)} | {2: hang(2, EVERYONE | {"name": "all_gather"})}
    found = diagnose(start(hang=dumps))
    assert found["kind"] == "disagreement" and found["ranks"] == [2]
    assert "ranks 0, 1 and 3 in all_reduce #123 (dp_shard); rank 2 in all_gather #123" in found["line"]


def test_connections_that_broke(start):
    """Rank 2 lost all of its connections, the others one each; a second later 1 has ended and takes 3 along."""
    own = {r: {"links": [link(10 + r, 20 + r)]} for r in (0, 1, 3)} | {
        2: {"links": [link(20 + r, 10 + r) for r in (0, 1, 3)]}
    }
    notes = {r: note(r, lost=[["10.0.0.1", 20 + r]]) for r in (0, 1)}
    notes[2] = note(2, lost=[["10.0.0.1", 10 + r] for r in (0, 1, 3)], time=NOW + 0.1)
    notes[3] = note(3, lost=[["10.0.0.1", 11], ["10.0.0.1", 10]], time=NOW + 1)
    found = diagnose(start(note=notes, links=own))
    assert found["kind"] == "network" and found["ranks"] == [2] and found["step"] == 57
    assert "the network path between rank 2 and ranks 0, 1 and 3 broke at step 57" in found["line"]


def test_all_gone_without_a_word(start):
    folder = start()
    assert diagnose(folder, over=False) is None
    assert diagnose(folder)["kind"] == "stopped"
    assert "ranks 0, 1, 2 and 3 ended without a word at step 57" in diagnose(folder)["line"]


def test_a_good_end_and_blank_notes(start, tmp_path):
    folder = start(beats={rank: beat(rank, phase="done") for rank in range(4)})
    (tmp_path / "rank-0.note.json").write_text(" " * files.SIZE)
    assert diagnose(folder) is None

"""Many cells, many processes, and kills at any moment. What a cell does is faked here where it does not matter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidlm.cli.main import main
from sidlm.errors import SidError
from sidlm.scaling.grid import read_grid
from sidlm.scaling.runner import Runner, collect

# takes a moment, notes that it did the work, and writes a result as a cell does; fails or dies where it is told to
FAKE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
facts = json.loads((folder / "cell.json").read_text())
print("working", flush=True)
with open(folder.parents[2] / "work.log", "a") as log:
    log.write(f"begin {facts['name']}\\n")
time.sleep(0.05)
if (folder / "fail").exists():
    sys.exit("sid: error: the fake cell fails")
if (folder / "die").exists():
    os.kill(os.getpid(), signal.SIGKILL)
temporary = folder / "result.tmp"
temporary.write_text(json.dumps(facts | {"loss": 1.0}))
temporary.replace(folder / "result.json")
with open(folder.parents[2] / "work.log", "a") as log:
    log.write(f"done {facts['name']}\\n")
"""
RUNNER = """
import sys
from pathlib import Path
from sidlm.scaling.grid import read_grid
from sidlm.scaling.runner import Runner
grid, out, fake = sys.argv[1:]
Runner(read_grid(grid, out), Path(out), command=[sys.executable, fake], workers=2, facts={}, log=print).run()
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


@pytest.fixture
def runner(grid, tmp_path, fake):
    """runner(**settings) -> a Runner of fake cells in tmp_path/out."""
    out = tmp_path / "out"
    cells = read_grid(grid, out)
    return lambda **kw: Runner(
        cells, out, **{"command": [sys.executable, str(fake)], "workers": 2, "facts": {}, "log": lambda _: None} | kw
    )


def work(out: Path) -> list[str]:
    return (out / "work.log").read_text().splitlines()


def test_finished_cells_are_not_repeated(runner, tmp_path):
    outcome = runner().run()
    assert len(outcome.finished) == 4 and not outcome.failed and not outcome.unfinished
    assert len(work(tmp_path / "out")) == 8
    assert runner().run() == outcome
    assert len(work(tmp_path / "out")) == 8
    (tmp_path / "out/sid/s/640-s0/result.json").unlink()
    runner().run()
    assert work(tmp_path / "out")[8:] == ["begin sid/s/640-s0", "done sid/s/640-s0"]


def test_failed_cells_are_reported_and_tried_again(runner, tmp_path):
    out, said = tmp_path / "out", []
    for name, how in (("sid/s/640-s0", "fail"), ("deep/s/640-s1", "die")):
        (out / name).mkdir(parents=True)
        (out / name / how).touch()
    outcome = runner(log=said.append).run()
    assert outcome.failed["sid/s/640-s0"] == "the fake cell fails"
    assert outcome.failed["deep/s/640-s1"] == "killed by SIGKILL; last words: working"
    assert len(outcome.finished) == 2 and sum("FAILED" in line for line in said) == 2
    rows = {row["name"]: row for row in collect(out)}
    assert len(rows) == 4 and rows["sid/s/640-s0"]["error"] == "the fake cell fails"
    assert rows["sid/s/640-s0"]["loss"] is None and rows["sid/s/640-s1"]["loss"] == 1.0
    for how in ("fail", "die"):
        next(out.glob(f"*/*/*/{how}")).unlink()
    assert len(runner().run().finished) == 4
    assert not list(out.glob("*/*/*/failed.json"))


def test_other_settings_are_another_grid(runner, grid, tmp_path):
    runner().run()
    again = read_grid(grid, tmp_path / "out", ["--optim.lr", "0.5"])
    with pytest.raises(SidError, match=r"optim.lr is 0.001 there and 0.5 here: choose another --out"):
        Runner(again, tmp_path / "out", command=["false"], workers=1, facts={}, log=print).run()
    elsewhere = read_grid(grid, tmp_path / "out", ["--data.cache_dir", "x", "--checkpoint.every", "7"])
    Runner(elsewhere, tmp_path / "out", command=["false"], workers=1, facts={}, log=print).run()


def test_runners_beside_each_other_killed_at_random_moments(grid, tmp_path, fake):
    """SIGKILL of whichever of two runners, with and without its cells: at the end each cell was finished once."""
    out, script, rng = tmp_path / "out", tmp_path / "runner.py", random.Random(3)
    script.write_text(RUNNER)
    content = grid.read_text().replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7]")
    grid.write_text(content)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, script, grid, out, fake], stdout=subprocess.DEVNULL, start_new_session=True
        )

    kills, runners = 0, [start(), start()]
    deadline = time.monotonic() + 100
    while any(r.poll() is None for r in runners) and kills < 4 and time.monotonic() < deadline:
        begun = (out / "work.log").exists()
        time.sleep(rng.uniform(0.05, 0.4) if begun else 0.1)
        if begun:
            victim = rng.randrange(2)
            kills += runners[victim].poll() is None
            runners[victim].kill()
            runners[victim].wait()
            runners[victim] = start()
    assert [r.wait(100) for r in runners] == [0, 0] and kills
    done = [line for line in work(out) if line.startswith("done")]
    assert len(done) == len(set(done)) == 16
    assert all(row["loss"] == 1.0 for row in collect(out))


def test_a_claimed_cell_is_left_to_its_runner_and_taken_over_when_that_dies(runner, tmp_path):
    out, name = tmp_path / "out", "sid/s/640-s0"
    (out / name).mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, out / name / "claim"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline()
    said = []

    def log(line: str) -> None:
        said.append(line)
        if len(said) == 3:  # the three others are done
            holder.kill()

    outcome = runner(log=log).run()
    holder.wait()
    assert len(outcome.finished) == 4 and name in said[3]


def test_real_cells_through_the_command_line(grid, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["scaling", "run", str(grid), "--list", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "sid/s/640-s0" in said and "4 cells" in said and not out.exists()
    grid.write_text(grid.read_text().replace("seeds: [0, 1]", "seeds: [1]"))
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    words = ["scaling", "run", str(grid), "--out", str(out), "--workers", "2", "--train.max_skipped", "7"]
    first = subprocess.Popen([sys.executable, "-m", "sidlm.cli.main", *words], env=env)
    while first.poll() is None and not list(out.glob("*/*/*/checkpoints/step-*")):
        time.sleep(0.05)
    first.kill()  # its cells notice, save and stop
    first.wait()
    assert main(words) == 0
    rows = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert {(row["variant"], row["seed"]) for row in rows} == {("sid", 1), ("deep", 1)}
    for row in rows:
        assert row["tokens"] == 640 and row["flops"] == pytest.approx(640 * row["flops_per_token"])
        assert 0 < row["loss"] < 8 and set(row["domains"]) == {"even", "odd"}
        assert row["tasks"]["toy"]["questions"] == 4 and row["wall_seconds"] > 0 and row["skipped_steps"] == 0
        assert all(row[key] for key in ("tokenizer", "data", "held_out", "config", "hardware", "params"))
        folder = out / row["name"]
        assert not (folder / "checkpoints").exists() and not (folder / "model").exists()
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5]
    assert rows[0]["tokenizer"] == rows[1]["tokenizer"] and rows[0]["held_out"] == rows[1]["held_out"]

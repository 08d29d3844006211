"""One process's part: what it writes, when it is overdue, what it says of itself and of processes that died."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from sidlm.cli.main import main as sid
from sidlm.errors import SidError
from sidlm.train.health import dump, files, monitor, peers
from sidlm.train.health.monitor import Health
from sidlm.train.processes import Processes


@pytest.fixture
def health(tmp_path):
    with Health(tmp_path / "run", Processes(), 5.0) as running:
        yield running


def child(code):
    return subprocess.Popen([sys.executable, "-S", "-c", code])


def test_beats_and_notes_have_their_place_at_once(health):
    sizes = {path.name: path.stat().st_size for path in health.folder.glob("*.json")}
    assert sizes == {"rank-0.json": files.SIZE, "rank-0.note.json": files.SIZE}
    health.at("step", 7)
    health._write_beat()
    beat = files.read(health.folder / "rank-0.json")
    assert (beat["step"], beat["phase"], beat["pid"]) == (7, "step", os.getpid())
    assert files.read(health.folder / "rank-0.note.json") is None
    health.at("step", 8)
    health.failed(RuntimeError("Connection closed by peer " + "x" * 9000))
    note = files.read(health.folder / "rank-0.note.json")
    assert note["step"] == 8 and note["follows"] and note["error"].startswith("RuntimeError: Connection closed")
    assert (health.folder / "rank-0.note.json").stat().st_size == files.SIZE


@pytest.mark.parametrize(
    ("phase", "seconds", "longest", "late"),
    [("step", 4, 0, False), ("step", 6, 0, True), ("step", 6, 1, False), ("step", 11, 1, True),
     ("validation", 29, 0, False), ("validation", 31, 0, True)],
)  # fmt: skip
def test_overdue(health, phase, seconds, longest, late):
    health.steps_here, health.longest = 2, longest
    health.phase, health.since = phase, time.time() - seconds
    assert health.overdue() is late
    health.seconds = 0.0
    assert not health.overdue()


def test_the_first_step_has_time_to_compile(health):
    health.at("step", 1)
    health.since = time.time() - 20
    assert not health.overdue()
    health.at("step", 2)
    assert health.longest == 0 and health.steps_here == 1


@pytest.mark.skipif(not peers.machine(), reason="no /proc")
def test_states_of_other_processes():
    sleeping, killed = child("import time; time.sleep(60)"), child("import time; time.sleep(60)")
    failed = child("raise SystemExit(7)")
    try:
        assert peers.gone(sleeping.pid) is None
        sleeping.send_signal(signal.SIGSTOP)
        killed.kill()
        for process, expected in (
            (killed, {"signal": "SIGKILL", "status": None}),
            (failed, {"signal": None, "status": 7}),
        ):
            deadline = time.monotonic() + 30
            while (how := peers.gone(process.pid)) is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert how == expected
            process.wait()
            assert peers.gone(process.pid) == {"signal": None, "status": None}
        while peers.state(sleeping.pid)[0] != "T":
            time.sleep(0.02)
    finally:
        sleeping.kill()
        sleeping.wait()


@pytest.mark.skipif(not peers.machine(), reason="no /proc")
def test_a_dead_peer_is_said_once(health, capsys):
    process = child("pass")
    process.wait()
    health.peers.append(peers.Peer(1, process.pid, "here", peers.machine()))
    dead = files.Place(health.folder / "rank-1.json")
    dead.write({"rank": 1, "pid": process.pid, "host": "here", "processes": 2, "step": 3, "phase": "step", "time": 1.0})
    for _ in range(2):
        health.look_at_peers()
    said = capsys.readouterr().err
    assert said.count("sid: rank 1 (here, pid") == 1 and "died without a word" in said and "at step 3" in said


def test_a_single_process_that_hangs_dumps_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monitor, "beat_seconds", lambda processes: 0.05)
    with Health(tmp_path / "run", Processes(), 0.1) as health:
        health.at("step", 1)
        health.at("step", 2)
        health.thread.join(20)
        assert not health.thread.is_alive()
    text = (health.folder / "rank-0.hang.txt").read_text()
    assert "rank 0, step of step 2" in text and "test_a_single_process_that_hangs" in text
    assert "rank 0" in capsys.readouterr().err
    assert diagnose_line(tmp_path / "run").startswith("rank 0")


def diagnose_line(out):
    from sidlm.train.health.diagnosis import diagnose

    return diagnose(files.starts(out)[-1][1])["line"]


def test_what_ended_a_start_is_known_to_the_next(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(OSError), Health(out, Processes(), 5.0) as health:
        health.at("step", 4)
        raise OSError(28, "No space left on device")
    with Health(out, Processes(), 5.0) as health:
        assert len(health.before) == 1 and "failed at step 4: OSError" in health.before[0]
        health.at("step", 5)
        health.survived("disk", "no disk space for step-5")
    with Health(out, Processes(), 5.0) as health:
        assert health.before == []
    capsys.readouterr()
    assert sid(["health", str(out)]) == 0
    said = capsys.readouterr().out
    assert "start 1: rank 0 (" in said and "survived at step 5: no disk space" in said and "ended well" in said
    assert sid(["health", str(out), "--json"]) == 0
    assert [record["kind"] for record in json.loads(capsys.readouterr().out)["history"]] == ["failed", "disk"]
    assert sid(["health", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_what_a_full_disk_kept_from_the_history_is_added_later(tmp_path, monkeypatch):
    out, add = tmp_path / "run", files.add_history
    with pytest.raises(OSError), Health(out, Processes(), 5.0):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "add_history", lambda *_: False)
    with Health(out, Processes(), 5.0) as health:
        assert len(health.before) == 1 and files.history(out) == []
        monkeypatch.setattr(files, "add_history", add)
    assert [(record["kind"], record["start"]) for record in files.history(out)] == [("failed", 1)]


def test_a_mistake_before_the_first_step_is_no_fault(tmp_path):
    for _ in range(2):
        with pytest.raises(SidError), Health(tmp_path, Processes(), 5.0) as health:
            assert health.before == []
            raise SidError("other data")
        health.folder.joinpath("rank-0.json").unlink()


def test_old_starts_go(tmp_path):
    for _ in range(files.KEPT + 3):
        folder = files.new_start(tmp_path)
    assert [number for number, _ in files.starts(tmp_path)] == list(range(4, files.KEPT + 4))
    assert folder.name == f"start-{files.KEPT + 3:04d}"


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="Linux only")
def test_links_and_probes():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            dump.probe_links()
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            (mine,) = [link for link in dump.links() if link["own"] == list(one.getsockname())]
            assert mine["peer"] == list(other.getsockname()) and mine["open"] and mine["unanswered"] == 0
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # the other end has closed it
            if not [m for m in dump.links() if m["own"] == list(one.getsockname()) and m["open"]]:
                return
        raise AssertionError("still open")


def test_where_a_thread_is():
    assert dump.where(threading.get_ident()).startswith("where (health/dump.py:")

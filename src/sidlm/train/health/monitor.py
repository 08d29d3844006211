"""One process's part in noticing faults: a thread that writes where the process is, looks whether the others on this
machine live, and ends the run when nothing moves any more.

The thread costs a write of 4 KB and a look at /proc in every beat. It needs no collective: what it learns goes through
files in OUT/health, which all processes see, so it still works when the network does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sidlm.errors import SidError
from sidlm.parallel.config import launched
from sidlm.train.health import dump, files, peers
from sidlm.train.health.diagnosis import diagnose
from sidlm.train.processes import Processes

PATIENT = 6
"""Times watchdog_seconds that the first step, validation, checkpoints and exports may take"""

PROBED = 2.0
"""Seconds in which probes of connections go unanswered at least twice, less one beat"""

EXIT_HUNG = 3
"""Exit status of processes that the watchdog ended"""

OF_OTHERS = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|gloo|NCCL|[Tt]imed out|[Ss]ocket", re.DOTALL)
"""In an error: it may only follow from what happened to another process"""


def fresh(beat: files.Record) -> bool:
    """Whether the process of a beat may still run."""
    return beat["phase"] != "done" and time.time() - beat["time"] < 10 * beat_seconds(beat["processes"])


def beat_seconds(processes: int) -> float:
    """Between two beats: thousands of processes must not flood the file system."""
    return max(1.0, processes / 100)


class Health:
    """As a context manager around a run in one process; `at` says where the run is.

    seconds: the watchdog's limit for a step, 0 = none. A step may also take ten times as long as the longest before it.
    """

    def __init__(self, out: Path, group: Processes, seconds: float) -> None:
        self.out, self.group, self.seconds = out, group, seconds
        self.rank = group.rank
        self.peers = group.everyone(peers.this(self.rank))
        self.to_keep: deque[files.Record] = deque()
        """for history.jsonl; on a full disk it waits"""
        self.before = self._history() if group.first else []
        """lines on how earlier starts ended, said by the first process"""
        self.tick = beat_seconds(group.count)
        self.step, self.phase, self.since = 0, "start", time.time()
        self.longest, self.steps_here, self.beaten = 0.0, 0, 0.0
        self.gone: dict[int, dict[str, Any]] = {}
        self.noted_failure = False
        self.hang: files.Record = {}
        self.links: list[dict[str, Any]] = []
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.folder = self._folder()
        self.beat, self.note = (files.Place(self.folder / f"rank-{self.rank}{kind}.json") for kind in ("", ".note"))

    def _folder(self) -> Path:
        folder = None
        if self.group.first:
            with contextlib.suppress(OSError):
                folder = files.new_start(self.out)
        # on a full disk there is none: what is written to a path that is not there is lost, and nothing else
        return self.group.told(folder) or files.health_folder(self.out) / "none"

    def _history(self) -> list[str]:
        """Diagnose the starts that nobody has diagnosed."""
        known = {record["start"] for record in files.history(self.out) if not record.get("survived")}
        lines = []
        for number, folder in files.starts(self.out):
            finding = None if number in known else diagnose(folder)
            if finding is not None:
                self.to_keep.append(finding | {"start": number})
                lines.append(str(finding["line"]))
        return lines

    def __enter__(self) -> Health:
        self._write_beat()
        self._keep_events()
        self.stacks: TextIO | None = None
        if hasattr(signal, "SIGUSR2"):  # not on Windows
            with contextlib.suppress(OSError):
                self.stacks = (self.folder / f"rank-{self.rank}.stacks.txt").open("w", encoding="utf-8")
                faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)
        self.thread = threading.Thread(target=self._watch, name="health", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.ended.set()
        self.thread.join()
        self._keep_events()
        if error is None:
            self.phase = "done"
        self._write_beat()
        if self.stacks is not None:
            faulthandler.unregister(signal.SIGUSR2)
            self.stacks.close()
        self.beat.close()
        self.note.close()

    def at(self, phase: str, step: int | None = None) -> None:
        """Progress: a phase begins. phase: step, validation, samples, checkpoint, export, start. step: the one in
        work, counted from 1."""
        now = time.time()
        if self.phase == "step":
            self.steps_here += 1
            if self.steps_here > 1:  # the first one compiles
                self.longest = max(self.longest, now - self.since)
        self.step = self.step if step is None else step
        self.phase, self.since = phase, now
        if now - self.beaten > self.tick / 100:
            self._write_beat()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """What fails in the body is noted before anything else happens: torchrun ends the others at once."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise

    def survived(self, kind: str, line: str, *, ranks: list[int] | None = None, step: int | None = None) -> None:
        """Keep, in history.jsonl, what went wrong and did not end the run; in one of the processes. ranks: at fault,
        this one if none are named; step: the current one. On a full disk it waits until there is room."""
        ranks = [self.rank] if ranks is None else ranks
        where = {
            "step": self.step if step is None else step,
            "phase": self.phase,
            "collective": None,
            "time": time.time(),
        }
        start = int(self.folder.name.removeprefix("start-")) if self.folder.name != "none" else 0
        self.to_keep.append({"kind": kind, "ranks": ranks} | where | {"line": line, "start": start, "survived": True})

    # ---- what went wrong ----

    def failed(self, error: BaseException) -> None:
        """Leave a note of an error, and of processes on this machine that are gone; once."""
        if self.noted_failure or (isinstance(error, SidError) and self.phase == "start"):  # a mistake, nothing is lost
            return
        self.noted_failure = True
        follows = not isinstance(error, SidError) and bool(OF_OTHERS.search(f"{type(error).__name__}: {error}"))
        seen = dump.collectives()
        note = self._where() | {
            "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600],
            "follows": follows,
            "collective": dump.waiting(seen) or (seen[-1] if seen and follows else None),
            "lost": self._lost() if follows else [],
            "ranks": getattr(error, "ranks", None),  # whom all processes found to have computed wrong numbers
        }
        self.note.write(note)
        deadline = time.monotonic() + 1.0
        while follows and not self.gone and time.monotonic() < deadline:  # a dying process closes its sockets first
            self.look_at_peers()
            time.sleep(0.02)

    def _lost(self) -> list[Any]:
        """The far ends of connections that were open after the first step and are no longer."""
        now_open = [link["own"] for link in dump.links() if link["open"]]
        return [link["peer"] for link in self.links if link["own"] not in now_open]

    def look_at_peers(self) -> None:
        """Whether processes on this machine died without a word; the first one that sees it says so."""
        with self.lock:
            new = {}
            for peer in self.peers:
                if not peer.here or peer.rank == self.rank or peer.rank in self.gone:
                    continue
                how = peers.gone(peer.pid)
                if how is not None and self._silent(peer):
                    new[peer.rank] = how | {"time": time.time()}
            self.gone |= new
        if new:
            self._write_beat()
            self._say_once()

    def _silent(self, peer: peers.Peer) -> bool:
        beat = files.read(self.folder / f"rank-{peer.rank}.json")
        return (beat or {}).get("phase") != "done" and files.read(self.folder / f"rank-{peer.rank}.note.json") is None

    def _say_once(self) -> None:
        try:
            os.close(os.open(self.folder / "said", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        except OSError:  # a full disk: rather said twice
            pass
        finding = diagnose(self.folder)
        if finding is not None:
            print(f"sid: {finding['line']}", file=sys.stderr, flush=True)

    # ---- the thread ----

    def _watch(self) -> None:
        while not self.ended.wait(self.tick):
            self._write_beat()
            self.look_at_peers()
            if self.steps_here and not self.links:
                self._keep_links()
            self._keep_events()
            if self.overdue() or (self.group.count > 1 and (self.folder / "hang").exists()):
                self._hung()
                return

    def _keep_links(self) -> None:
        """Who talks to whom, while all of them can."""
        self.links = dump.links()
        with contextlib.suppress(OSError):
            files.write(self.folder / f"rank-{self.rank}.links.json", {"links": self.links})

    def overdue(self) -> bool:
        """Whether this process has been in its phase for too long."""
        usual = self.phase == "step" and self.steps_here > 0
        limit = max(self.seconds, 10 * self.longest) * (1 if usual else PATIENT)
        return self.seconds > 0 and self.phase != "done" and time.time() - self.since > limit

    def _hung(self) -> None:
        """Dump, wait for the dumps of others, say which process is at fault, and end this one."""
        with contextlib.suppress(OSError):
            (self.folder / "hang").touch()
        dump.probe_links()
        self._dump()
        if not launched():  # nobody waits, and nobody would start it again
            self._say_once()
            return
        if self.ended.wait(2 * self.tick + PROBED):
            return
        self._keep_dump()
        if self.ended.wait(self.tick):
            return
        dumped = files.read_ranks(self.folder, ".hang")
        if self.rank == min(dumped, default=self.rank):
            self._ask_the_silent(set(dumped))
            self._say_once()
        elif self.ended.wait(PROBED):
            return
        sys.stderr.flush()
        os._exit(EXIT_HUNG)

    def _dump(self) -> None:
        seen, connections = dump.collectives(), dump.links()
        self.hang = self._where() | {"collective": dump.waiting(seen), "in": dump.where()}
        self._keep_dump()
        title = f"rank {self.rank}, {self.phase} of step {self.step}, where it has been for "
        title += f"{time.time() - self.since:.0f} seconds"
        with contextlib.suppress(OSError):
            with (self.folder / f"rank-{self.rank}.hang.txt").open("w", encoding="utf-8") as file:
                dump.write_text(file, title, seen, connections)

    def _keep_dump(self) -> None:
        with contextlib.suppress(OSError):
            files.write(self.folder / f"rank-{self.rank}.hang.json", self.hang | {"links": dump.links()})

    def _ask_the_silent(self, dumped: set[int]) -> None:
        """Of processes on this machine whose thread does not run: their state, and their stacks from a C handler."""
        for peer in self.peers:
            if peer.here and peer.rank not in dumped and peers.gone(peer.pid) is None:
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGUSR2)
                    time.sleep(0.2)
                    files.write(self.folder / f"rank-{peer.rank}.state.json", {"state": peers.state(peer.pid)[0]})

    def _where(self) -> files.Record:
        peer = self.peers[self.rank]
        return {
            "rank": self.rank, "pid": peer.pid, "host": peer.host, "processes": self.group.count, "step": self.step,
            "phase": self.phase, "since": self.since, "time": time.time(),
        }  # fmt: skip

    def _keep_events(self) -> None:
        with self.lock:
            while self.to_keep and files.add_history(self.out, self.to_keep[0]):
                self.to_keep.popleft()

    def _write_beat(self) -> None:
        self.beaten = time.time()
        self.beat.write(self._where() | {"gone": self.gone})

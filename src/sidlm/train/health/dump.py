"""What a process can tell of itself when nothing moves: Python stacks, collectives, the state of its connections."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

ESTABLISHED = 1
"""TCP's state, as TCP_INFO gives it"""

Collective = dict[str, Any]
"""{"name", "number", "group", "ranks", "done", "sizes", "time"}: the number counts in its group, time is Unix time"""


def groups() -> dict[str, tuple[str, list[int]]]:
    """Process group's name in the flight recorder -> (mesh dimension or what it is for, its ranks)."""
    with contextlib.suppress(Exception):  # private names of torch: without them groups keep their numbers
        world: Any = dist.distributed_c10d._world
        found = {}
        for group, name in world.pg_names.items():
            what = (group.group_desc or "").removeprefix("mesh_")
            ranks = sorted(world.pg_group_ranks[group])
            everyone = len(ranks) == dist.get_world_size() and what in ("", "undefined", "default_pg")
            found[name] = ("all processes" if everyone else what, ranks)
        return found
    return {}


def collectives(last: int = 40) -> list[Collective]:
    """The newest collectives of this process, oldest first, from torch's flight recorder (empty without one).

    torch records them where TORCH_FR_BUFFER_SIZE was above 0 when the processes met.
    """
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # pyright: ignore[reportAttributeAccessIssue]

        trace = json.loads(_dump_fr_trace_json(True, False))
    except (ImportError, RuntimeError, ValueError):  # another torch: the dump has stacks all the same
        return []
    known = groups()
    found = []
    for entry in trace.get("entries", [])[-last:]:
        group = entry["process_group"]
        what, ranks = known.get(group[0], (group[1] or group[0], []))
        found.append(
            {
                "name": entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
                "number": entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                "group": what,
                "ranks": ranks,
                "done": entry["retired"] or entry["state"] == "completed",
                "sizes": entry["input_sizes"],
                "time": entry["time_created_ns"] / 1e9,
            }
        )
    return found


def waiting(found: list[Collective]) -> Collective | None:
    """The first collective that is not done."""
    return next((entry for entry in found if not entry["done"]), None)


def where(thread: int | None = None) -> str:
    """ "function (file:line)" in which a thread is; the main one if none is named."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0 if thread is None else thread)
    if frame is None:
        return "?"
    last = traceback.extract_stack(frame, limit=1)[-1]
    place = "/".join(Path(last.filename).parts[-2:])
    return f"{last.name} ({place}:{last.lineno})"


def links() -> list[dict[str, Any]]:
    """The TCP connections of this process: {"own": [address, port], "peer": [...], "open", "unanswered": how often
    the oldest segment, or a probe, was sent in vain, "unacknowledged": segments in flight}. Linux only."""
    found = []
    for opened in _connections():
        with opened, contextlib.suppress(OSError):
            # struct tcp_info: state, ca_state, retransmits, probes, ... and from byte 24 on unacked, a u32. The kernel
            # answers for a process that is stopped: only a lost path leaves segments without an answer
            info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            found.append(
                {
                    "own": _plain(opened.getsockname()),
                    "peer": _plain(opened.getpeername()),
                    "open": info[0] == ESTABLISHED,
                    "unanswered": max(info[2], info[3]),
                    "unacknowledged": struct.unpack_from("I", info, 24)[0],
                }
            )
    return found


def probe_links() -> None:
    """Let the kernel ask the other end of every connection each second whether it is there; `links` has the answers.

    Where a path is lost, most connections are idle: nothing is sent on them in vain.
    """
    for opened in _connections():
        with opened, contextlib.suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 30)):
                opened.setsockopt(socket.IPPROTO_TCP, option, value)


def _connections() -> list[socket.socket]:
    """A second handle of each, to be closed."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    found.append(socket.socket(fileno=os.dup(int(name))))
    inet = (socket.AF_INET, socket.AF_INET6)
    kept = [opened for opened in found if opened.type == socket.SOCK_STREAM and opened.family in inet]
    for opened in found:
        if opened not in kept:
            opened.close()
    return kept


def _plain(address: tuple[Any, ...]) -> list[Any]:
    return [address[0].removeprefix("::ffff:"), address[1]]


def write_text(file: TextIO, title: str, found: list[Collective], connections: list[dict[str, Any]]) -> None:
    """A dump for people: every thread's stack, the collectives, the connections."""
    file.write(f"{title}\n\nthe main thread is in {where()}\n\nstacks, innermost call first\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.write(f"\nlast {len(found)} collectives, newest last\n")
    for entry in found:
        state = "done" if entry["done"] else "WAITING"
        file.write(
            f"{entry['name']:<24} #{entry['number']:<6} {state:<8} {entry['group']} {entry['ranks']} {entry['sizes']}\n"
        )
    file.write("\nconnections\n")
    for link in connections:
        state = f"{link['unacknowledged']} segments unacknowledged, {link['unanswered']} times sent again in vain"
        file.write(f"{link['own'][0]}:{link['own'][1]} -> {link['peer'][0]}:{link['peer'][1]}  {state}\n")

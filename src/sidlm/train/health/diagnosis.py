"""From the files of a start: what went wrong first, in which process, at which step, in which collective.

Evidence is weighed in the order of time: a process that died without a word, an error that is not another process's
fault, the watchdog's dumps. Errors of lost connections alone mean that the network failed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sidlm.train.health import files

Finding = dict[str, Any]
"""{"kind": killed, failed, corruption, hung, network, disagreement or stopped; "ranks": those at fault; "step",
"phase", "collective": where it was noticed, or None; "time": of the first evidence; "line": all of it for people}"""

AFTER_A_NOTE = 1.5
"""Seconds from the first error that a death may have caused until a survivor has seen the dead"""

AT_ONCE = 0.5
"""Seconds in which processes see a lost connection; after it, those that have seen one end, and take others along"""

LOST = 2
"""How often in a row a segment was sent in vain on a connection that counts as lost; an idle one has 0"""


def diagnose(folder: Path, *, over: bool = True) -> Finding | None:
    """What ended, or stops, the start whose files are in a folder (see files.py); None if it ended well.

    over: whether its processes are known to have ended; None too, if they may run on.
    """
    beats, notes, dumps = (files.read_ranks(folder, kind) for kind in ("", ".note", ".hang"))
    states = {rank: record["state"] for rank, record in files.read_ranks(folder, ".state").items()}
    found = [killed(beats, notes), failed(notes), hung(beats, dumps, states)]
    first = min((f for f in found if f is not None), key=lambda finding: finding["time"], default=None)
    return first or disconnected(notes, files.read_ranks(folder, ".links")) or (stopped(beats) if over else None)


def killed(beats: dict[int, Any], notes: dict[int, Any]) -> Finding | None:
    """The first process that others saw gone, and that had left no note."""
    # torchrun ends the others when one has failed: of SIGTERM, and in the end of SIGKILL
    last = min((note["time"] for note in notes.values()), default=float("inf")) + AFTER_A_NOTE
    seen = [
        (how["time"], int(rank), how)
        for beat in beats.values()
        for rank, how in beat.get("gone", {}).items()
        if how["signal"] != "SIGTERM" and how["time"] < last and int(rank) in beats
    ]
    if not seen:
        return None
    time, rank, how = min(seen, key=lambda one: one[0])
    beat = beats[rank]
    way = (
        f"was killed by {how['signal']}" if how["signal"]
        else f"ended with status {how['status']} and without a word" if how["status"] is not None
        else "died without a word (killed by SIGKILL or for want of memory)"
    )  # fmt: skip
    collective = next(
        (note["collective"] for note in notes.values() if note["collective"] and rank in note["collective"]["ranks"]),
        None,
    )
    inside = [r for r, note in notes.items() if same(note["collective"], collective)] if collective else []
    line = f"{name(beat)} {way} {at(beat)}"
    if inside:
        line += f", while {those(inside, 'was', 'were')} in {title(collective)}"
    return finding("killed", [rank], beat, collective, time, line, signal=how["signal"])


def failed(notes: dict[int, Any]) -> Finding | None:
    """The first error that is not of another process's making."""
    own = [note for note in notes.values() if not note["follows"]]
    if not own:
        return None
    note = min(own, key=lambda one: one["time"])
    if note.get("ranks"):
        line = note["error"].partition(": ")[2]
        return finding("corruption", note["ranks"], note, None, note["time"], line, error=note["error"])
    line = f"{name(note)} failed {at(note)}: {note['error']}"
    return finding("failed", [note["rank"]], note, note["collective"], note["time"], line, error=note["error"])


def hung(beats: dict[int, Any], dumps: dict[int, Any], states: dict[int, str]) -> Finding | None:
    """The processes for which the others wait: without a dump, or in no collective, or behind a lost connection."""
    if not dumps:
        return None
    silent = [rank for rank in beats if rank not in dumps and beats[rank]["phase"] != "done"]
    outside = [rank for rank, dump in dumps.items() if dump["collective"] is None]
    waiting = {rank: dump for rank, dump in dumps.items() if dump["collective"] is not None}
    suspects = silent or (outside if waiting or len(dumps) == 1 else [])
    time = min(dump["time"] for dump in dumps.values())
    if not suspects:
        return network(beats, dumps, time) or disagreement(dumps, time)
    at_fault = beats[suspects[0]] if silent else dumps[suspects[0]]
    waits = [dump for dump in waiting.values() if set(suspects) & set(dump["collective"]["ranks"])]
    collective = waits[0]["collective"] if waits else None
    lines = []
    for rank in suspects:
        how = f"hangs in {dumps[rank]['in']}" if rank in dumps else "hangs"
        how = {"T": "is stopped (state T)", "D": "hangs in the kernel (state D)"}.get(states.get(rank, ""), how)
        lines.append(f"{name(beats[rank])} {how}")
    line = f"{', '.join(lines)} {at(at_fault)}"
    if collective:
        inside = [rank for rank, dump in waiting.items() if same(dump["collective"], collective)]
        line += f" and has not reached {title(collective)}, in which {those(inside, 'waits', 'wait')} for "
        line += f"{time - collective['time']:.0f} s"
    return finding("hung", suspects, at_fault, collective, time, line)


def network(beats: dict[int, Any], dumps: dict[int, Any], time: float) -> Finding | None:
    """Everybody waits, and what some send is never acknowledged: the process at most such connections is cut off."""
    owner = {tuple(link["own"]): rank for rank, dump in dumps.items() for link in dump["links"]}
    lost = {
        frozenset((rank, owner[tuple(link["peer"])]))
        for rank, dump in dumps.items()
        for link in dump["links"]
        if link["unanswered"] >= LOST and tuple(link["peer"]) in owner
    }
    ranks, others = culprits(lost)
    if not ranks:
        return None
    dump = dumps[ranks[0]]
    collective = dump["collective"]
    who = " and ".join(name(beats[rank]) for rank in ranks)
    line = f"the network path between {who}{f' and {those(others)}' if others else ''} is lost {at(dump)}"
    line += f": what is sent is not acknowledged; all processes wait, {those(ranks)} in {title(collective)}"
    return finding("network", ranks, dump, collective, time, line)


def culprits(pairs: set[frozenset[int]]) -> tuple[list[int], list[int]]:
    """Of pairs of processes with a lost connection: those in most of them, and the rest. Of one pair, both."""
    ends = Counter(rank for pair in pairs if len(pair) == 2 for rank in pair)
    most = max(ends.values(), default=0)
    ranks = sorted(rank for rank, count in ends.items() if count == most)
    return ranks, sorted(set(ends) - set(ranks))


def disagreement(dumps: dict[int, Any], time: float) -> Finding:
    """Everybody waits, in collectives that do not meet."""
    ranks_in: dict[str, list[int]] = {}
    for rank, dump in dumps.items():
        what = title(dump["collective"]) if dump["collective"] else f"no collective but {dump['in']}"
        ranks_in.setdefault(what, []).append(rank)
    fewest = min(ranks_in.values(), key=len)
    dump = dumps[fewest[0]]
    where = "; ".join(f"{those(ranks)} in {what}" for what, ranks in ranks_in.items())
    ranks = fewest if len(ranks_in) > 1 else []
    return finding("disagreement", ranks, dump, dump["collective"], time, f"nothing moves {at(dump)}: {where}")


def disconnected(notes: dict[int, Any], links: dict[int, Any]) -> Finding | None:
    """Connections broke though nobody died: the process that most others lost."""
    if not notes:
        return None
    note = min(notes.values(), key=lambda one: one["time"])
    owner = {tuple(link["own"]): rank for rank, record in links.items() for link in record["links"]}
    ranks, others = culprits(
        {
            frozenset((rank, owner[tuple(peer)]))
            for rank, one in notes.items()
            for peer in one["lost"]
            if tuple(peer) in owner and one["time"] < note["time"] + AT_ONCE
        }
    )
    who = f"the network path between {those(ranks)} and {those(others)}" if others else "a network path"
    what = note["error"].partition(". ")[0]
    line = f"{who} broke {at(note)}, in {title(note['collective'])}: {name(note)} saw {what}"
    return finding("network", ranks, note, note["collective"], note["time"], line, error=note["error"])


def stopped(beats: dict[int, Any]) -> Finding | None:
    """All processes ended without a word, as when the machine or torchrun was killed; None if a beat is fresh."""
    unfinished = [beat for beat in beats.values() if beat["phase"] != "done"]
    if not unfinished:
        return None
    beat = max(unfinished, key=lambda one: one["time"])
    line = f"{those([one['rank'] for one in unfinished])} ended without a word {at(beat)}"
    return finding("stopped", [], beat, None, beat["time"], line)


# ---- words ----


def finding(kind: str, ranks: list[int], record: Any, collective: Any, time: float, line: str, **more: Any) -> Finding:
    return {
        "kind": kind, "ranks": ranks, "step": record["step"], "phase": record["phase"], "collective": collective,
        "time": time, "line": line,
    } | more  # fmt: skip


def name(record: Any) -> str:
    return f"rank {record['rank']} ({record['host']}, pid {record['pid']})"


def at(record: Any) -> str:
    if record["phase"] == "start":
        return "while it started"
    return f"at step {record['step']}" + (f" in its {record['phase']}" if record["phase"] != "step" else "")


def those(ranks: list[int], one: str = "", several: str = "") -> str:
    """ "rank 1", "ranks 0, 1 and 3", and the verb that fits."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}".rstrip()
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} {several}".rstrip()


def title(collective: Any) -> str:
    """ "all_reduce #12 (dp_shard)"."""
    return f"{collective['name']} #{collective['number']} ({collective['group']})" if collective else "no collective"


def same(one: Any, other: Any) -> bool:
    keys = ("name", "number", "group", "ranks")
    return bool(one and other) and all(one[key] == other[key] for key in keys)

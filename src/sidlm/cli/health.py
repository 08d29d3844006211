"""`sid health OUT`: where the processes of a run are, and what ended its earlier starts, from files alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sidlm.cli.common import Parser
from sidlm.errors import SidError


def main(argv: list[str]) -> int:
    """Print it; 0 whatever went wrong in the run. Raises SidError for a folder without a run."""
    parser = Parser(
        "health",
        "Where the processes of a run are (step, phase, since when), and what ended each start that did not end well: "
        "which process, at which step, in which collective. Reads the files that the processes left in OUT/health, so "
        "it also works while the run goes on, and after all of them have died.",
        "  sid health runs/nano\n  sid health runs/nano --json",
    )
    parser.add_argument("run", help="run folder (train.out)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    out = Path(args.run)
    if not (out / "health").is_dir():
        raise SidError(f"no folder {out / 'health'}: {out} is not a run folder, or its run is older than this command")
    found = look(out)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


def look(out: Path) -> dict[str, Any]:
    """{"start": number of the newest one, "alive": whether beats are fresh, "processes": beats with their age in
    seconds, "now": its diagnosis or None, "history": those of earlier starts, oldest first}."""
    from sidlm.train.health import files
    from sidlm.train.health.diagnosis import diagnose
    from sidlm.train.health.monitor import fresh

    newest = files.starts(out)[-1:]
    history = files.history(out)
    if not newest:
        return {"start": 0, "alive": False, "processes": [], "now": None, "history": history}
    ((number, folder),) = newest
    beats = files.read_ranks(folder, "")
    alive = any(fresh(beat) for beat in beats.values())
    processes = [beat | {"age": round(time.time() - beat["time"], 1)} for beat in beats.values()]
    known = any(record["start"] == number and not record.get("survived") for record in history)
    now = None if known else diagnose(folder, over=not alive)
    return {"start": number, "alive": alive, "processes": processes, "now": now, "history": history}


def show(found: dict[str, Any]) -> None:
    for record in found["history"]:
        survived = f"survived at step {record['step']}: " if record.get("survived") else ""
        print(f"start {record['start']}: {survived}{record['line']}")
    for beat in found["processes"]:
        in_phase = time.time() - beat["since"] if found["alive"] else beat["time"] - beat["since"]
        print(
            f"start {found['start']}: rank {beat['rank']} ({beat['host']}, pid {beat['pid']}): {beat['phase']}, step "
            f"{beat['step']}, for {in_phase:.0f} s; last beat {beat['age']:.0f} s ago"
        )
    if found["now"] is not None:
        print(f"start {found['start']}: {found['now']['line']}")
    elif found["processes"] and not found["alive"]:
        print(f"start {found['start']}: ended well")

"""Files of a grid that are whole or absent, whenever a process is killed, and claims that die with their process."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one; several processes may do so at once."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's are the owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_json(path: Path) -> Any | None:
    """The file's content, None if it is not there. It was written whole, so anything else in it is an error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def claim(path: Path) -> IO[str] | None:
    """The opened lock file if nobody else holds it, else None. It is held until it is closed here and in all children
    that inherited it; a killed process lets go."""
    file = path.open("a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock: one process for each grid there
        pass
    except BlockingIOError:
        file.close()
        return None
    return file

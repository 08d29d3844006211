"""Which of cuSPARSELt's algorithms to take: all that compute the right numbers are timed once, the fastest remembered.

The library's default is up to twice slower than its best, and some algorithms have computed wrong numbers (PyTorch
issue 155333). Results are kept on disk under $SID_CACHE (~/.cache/sid), for each device, library and shape.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LAST = 200
"""No version has as many; the library refuses the first number that is none of its algorithms."""
CYCLES_TO_QUEUE = 1_500_000
"""Of the device, longer than the host takes for one call (0.4 ms): it sleeps while the calls to time are queued."""

_known: dict[str, dict[str, int]] = {}
"""Device and library -> shape -> algorithm, of this process and of those before it."""


class Timed(NamedTuple):
    milliseconds: float
    algorithm: int


def path() -> Path:
    """The file they are kept in."""
    folder = Path(os.environ.get("SID_CACHE") or "~/.cache/sid").expanduser()
    return folder / "sparse24" / "algorithms.json"


def _load() -> dict[str, dict[str, int]]:
    """What the file says, as far as it makes sense: a broken one is as good as none."""
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    shapes = {machine: x for machine, x in found.items() if isinstance(x, dict)}
    return {
        machine: {shape: i for shape, i in x.items() if type(i) is int and 0 <= i < LAST}
        for machine, x in shapes.items()
    }


def _store(machine: str, shape: str, algorithm: int) -> None:
    """Add one to the file; where that cannot be written, the next process searches again."""
    merged = _load()
    merged.setdefault(machine, {})[shape] = algorithm
    with contextlib.suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path().parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(merged, file, indent=1, sort_keys=True)
        os.replace(name, path())


def bucket(n: int) -> int:
    """The smallest 2^k or 3 * 2^k that is at least n: sizes this close share an algorithm."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def search(run: Callable[[int], Tensor], right: Callable[[Tensor], bool], time: Callable) -> int | None:
    """The fastest algorithm whose result is right every time it is looked at; None if there is none.

    run(algorithm) -> the product; it raises RuntimeError for a number that is no algorithm, which ends the search, or
    for one that cannot do this product. time(function, repeats) -> milliseconds of the function, a median.
    """
    timed = []
    refused = 0
    for algorithm in range(LAST):
        try:
            if right(run(algorithm)):
                timed.append(Timed(time(lambda i=algorithm: run(i), 3), algorithm))
            refused = 0
        except RuntimeError:
            refused += 1
            if refused == 3:
                break
    finalists = [x.algorithm for x in sorted(timed)[:4]]
    again = sorted(Timed(time(lambda i=i: run(i), 10), i) for i in finalists)
    return next((x.algorithm for x in again if right(run(x.algorithm))), None)


def device_time(function: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of the function on the current device, median, without what the host needs to call it."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(repeats)]
    torch.cuda._sleep(CYCLES_TO_QUEUE * repeats)
    for begin, end in pairs:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]


def best(machine: str, shape: str, run: Callable[[int], Tensor], right: Callable[[Tensor], bool]) -> int | None:
    """The algorithm for this shape, searched where it is not known, and then kept; None if none is right.

    While a CUDA graph is captured nothing can be timed: 0, the default, unless it is known.
    """
    if not _known:
        _known.update(_load())
    known = _known.setdefault(machine, {})
    if shape not in known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return 0
        found = search(run, right, device_time)
        if found is None:
            return None
        known[shape] = found
        _store(machine, shape, found)
    return known[shape]

"""`sid extend CONFIG.yaml [--section.key value ...]`: lengthen a model's context in stages, or go on where it is."""

from __future__ import annotations

import os
import shlex
import sys
import time

from sidlm.errors import SidError
from sidlm.parallel.config import launched
from sidlm.train.extend import extend, load_extension


def main(argv: list[str]) -> int:
    """Run the command; 0, or 128 + the signal that ended it early (its checkpoint is written)."""
    path, settings = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    first = not launched() or os.environ["RANK"] == "0"
    try:
        cfg = load_extension(path, settings)
    except SidError:
        if first:
            raise
        time.sleep(5.0)  # of several processes the first one says it; torchrun would end it if this one ended before
        return 2
    result = extend(cfg)
    if first and result.signal:
        again = "the same torchrun command" if launched() else shlex.join(["sid", "extend", *argv])
        print(f"sid: stopped by signal {result.signal} in {result.out}; continue with: {again}", file=sys.stderr)
    elif first:
        print(f"done: {len(result.record['stages'])} stages have passed; model: {result.out / 'model'}")
    return 128 + result.signal if result.signal else 0

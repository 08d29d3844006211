"""`sid train [CONFIG.yaml] [--section.key value ...]`: train a model, or go on where the run folder is."""

from __future__ import annotations

import os
import shlex
import sys
import time

from sidlm.errors import SidError
from sidlm.parallel.config import launched
from sidlm.train.config import load_config


def main(argv: list[str]) -> int:
    """Run the command; 0, or 128 + the signal that ended the run early (its checkpoint is written)."""
    path, settings = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    first = not launched() or os.environ["RANK"] == "0"
    try:
        cfg = load_config(path, settings)
    except SidError:
        if first:
            raise
        time.sleep(5.0)  # of several processes the first one says it; torchrun would end it if this one ended before
        return 2

    from sidlm.train.loop import train  # torch and transformers: only once the settings are right

    result = train(cfg)
    if not first:
        return 128 + result.signal if result.signal else 0
    if result.signal:
        again = "the same torchrun command" if launched() else shlex.join(["sid", "train", *argv])
        print(
            f"sid: stopped by signal {result.signal} after step {result.step}; continue with: {again}", file=sys.stderr
        )
        return 128 + result.signal
    valid = result.valid.get("all")
    measured = f", valid loss {valid['loss']:.4f} ({valid['bits_per_byte']:.4f} bits per byte)" if valid else ""
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    speed = f"{result.tokens:,} tokens at {result.tokens_per_second:,.0f} a second"
    print(f"done: step {result.step}{loss}{measured}, {speed}")
    print(f"model: {result.out / 'model'}   report: {result.out / 'report.html'}")
    return 0

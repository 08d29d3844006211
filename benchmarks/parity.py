"""The parity table: every plan over 2, 4 and 8 gloo processes against one process, in float64.

python benchmarks/parity.py --json benchmarks/results/parity.json

Runs the cases of tests/parallel/parity.py: packed documents, a vocabulary of 131. Of each, the worst error of the loss,
of any gradient, of their norm and of any weight after two clipped AdamW steps, relative to the norm of that tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sidlm.train.hardware import environment

PROGRAM = Path(__file__).parents[1] / "tests/parallel/parity.py"
SETS = {"two": 2, "four": 4, "more": 4, "eight": 8}


def rows_of(name: str, seconds: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        settings = os.environ | {"OMP_NUM_THREADS": "1", "SECONDS": str(seconds)}
        subprocess.run([sys.executable, PROGRAM, folder, name], check=True, env=settings)
        errors = json.loads((Path(folder) / "results.json").read_text())["errors"]
    rows = []
    for case, found in errors.items():
        if case.startswith("loss of"):  # of the split loss alone
            continue
        kinds = {"loss": [], "gradients": [], "norm": [], "weights": []}
        for tensor, error in found.items():
            kinds[{"grad": "gradients", "weight": "weights"}.get(tensor.split()[0], tensor)].append(error)
        worst = {kind: max(numbers) for kind, numbers in kinds.items() if numbers}
        rows.append({"case": case, "processes": SETS[name], **worst})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seconds", type=float, default=900)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.sets:
        rows += rows_of(name, arguments.seconds)
        if arguments.json:
            result = {"environment": environment(torch.device("cpu")), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        errors = " | ".join(f"{row[kind]:.0e}" for kind in ("loss", "gradients", "norm", "weights"))
        print(f"| {row['case']} | {row['processes']} | {errors} |")


if __name__ == "__main__":
    main()

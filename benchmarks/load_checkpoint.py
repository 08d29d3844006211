"""Claim: a safetensors folder loads at the speed of the disk, with peak memory below 1.1 times its weights.

    python benchmarks/load_checkpoint.py FOLDER [--preset 1b] [--shard-gb 1] [--json FILE]

Writes a random checkpoint with the shape of a preset (as a Llama, bf16) into FOLDER, which must not exist, and removes
it at the end. Then, each in a process of its own and in turn: a plain read of its files (the disk's speed),
`SidForCausalLM.from_pretrained` and transformers' `LlamaForCausalLM.from_pretrained`, with the files dropped from the
system's page cache before ("cold") and again with them in it ("warm"). After loading every weight is read once, for a
mapped file costs nothing until it is. Memory is the peak of resident memory, file pages included, less what the process
had before loading.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = ("read", "sid", "transformers")


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def write_checkpoint(folder: Path, preset_name: str, shard_bytes: int) -> None:
    import torch

    from sidlm.models.convert.run import write_config
    from sidlm.models.convert.safetensors_writer import write_safetensors
    from sidlm.models.convert.source import Entry, expected_tensors
    from sidlm.models.presets import preset

    class Random:
        def __init__(self) -> None:
            self.folder, self.config = folder, preset(preset_name, arch="llama")
            shapes = expected_tensors(self.config)
            self.tensors = {name: Entry(shape, torch.bfloat16) for name, shape in shapes.items()}

    source = Random()
    folder.mkdir()

    def draw(name: str) -> torch.Tensor:
        entry = source.tensors[name]
        return torch.randn(entry.shape, dtype=entry.dtype) / 50

    write_safetensors(folder, source.tensors, draw, max_bytes=shard_bytes)
    write_config(folder, source, "llama")
    for path in folder.glob("*.safetensors"):
        misalign(path)


def misalign(path: Path) -> None:
    """Give the tensors an odd place in the file, as most published ones have: mapped they cannot be used in place."""
    other = path.with_suffix(".tmp")
    with path.open("rb") as source, other.open("wb") as target:
        length = int.from_bytes(source.read(8), "little")
        header = source.read(length).rstrip() + b" "
        header += b" " * (8 - len(header) % 8)  # a multiple of 8, as the library writes
        if (8 + len(header)) % 64 == 0:
            header += b" " * 8
        target.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(source, target, 1 << 24)
    other.replace(path)


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, library: str) -> dict[str, float]:
    """In this process: load once."""
    if library == "read":
        start, total, buffer = time.perf_counter(), 0, bytearray(1 << 24)
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
        return {"seconds": time.perf_counter() - start, "bytes": total}
    import torch
    import transformers

    from sidlm.models import SidForCausalLM

    transformers.logging.disable_progress_bar()
    cls = SidForCausalLM if library == "sid" else transformers.LlamaForCausalLM
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = status("VmRSS")
    start = time.perf_counter()
    model = cls.from_pretrained(folder, dtype="auto")
    loaded = time.perf_counter() - start
    for parameter in model.parameters():  # every page, in small pieces
        for piece in parameter.detach().flatten().split(1 << 20):
            piece.view(torch.int16).max()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = status("VmHWM") - before
    return {
        "seconds_from_pretrained": loaded, "seconds": time.perf_counter() - start, "bytes": weights,
        "peak_bytes": peak, "peak_ratio": peak / weights,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--libraries", choices=LIBRARIES, nargs="+", default=LIBRARIES)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--measure", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure)))
        return
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists")
    facts = {"command": " ".join(["python", *sys.argv]), "python": platform.python_version(), "cpus": os.cpu_count(),
             "preset": args.preset, "shard_gb": args.shard_gb, "load_average_before": os.getloadavg()}  # fmt: skip
    runs: dict[str, list[dict]] = {}
    try:
        write_checkpoint(args.folder, args.preset, int(args.shard_gb * 1e9))
        for repeat in range(args.repeats):
            for library in args.libraries:
                for cache in ("cold", "warm"):
                    if cache == "cold":
                        drop_from_page_cache(args.folder)
                    command = [sys.executable, __file__, str(args.folder), "--measure", library]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    row = json.loads(out.splitlines()[-1])
                    runs.setdefault(f"{library}, {cache}", []).append(row)
                    speed = row["bytes"] / row["seconds"] / 1e9
                    memory = f", peak {row['peak_ratio']:.3f} x weights" if "peak_ratio" in row else ""
                    print(
                        f"{repeat} {library:<13}{cache:<5}{row['seconds']:7.2f} s {speed:5.2f} GB/s{memory}", flush=True
                    )
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in runs.items()
    }
    facts["load_average_after"] = os.getloadavg()
    if args.json:
        Path(args.json).write_text(json.dumps({"facts": facts, "median": medians, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a cubin says about itself: registers, spills, tensor-core instructions, and the loops that these are in.

Loops are those of the control flow, not of the text: waits are placed out of line and jump back, and the partitions of
a warp-specialised kernel all lie in the loop that hands them out.
"""

import re
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

from sidlm.ops import nvrtc

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")
_PRODUCT = re.compile(rf"\b(?:{'|'.join(MATRIX)})\b")
_TO_SHARED = re.compile(r"\b(?:STS|STSM)\b")


class Cubins:
    """CUDA C++ sources by name, each compiled once, and what cuobjdump says of them with an option."""

    def __init__(self, folder: Path, sources: dict[str, str]):
        self.folder, self.sources = folder, sources

    def __call__(self, name: str, option: str) -> str:
        file = self.folder / f"{name}.cubin"
        if not file.exists():
            file.write_bytes(nvrtc.compiled(self.sources[name]))
        return subprocess.run([TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may follow."""

    code: list[str]
    after: list[int]

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(text)) for text in self.code)


def blocks(sass: str) -> list[Block]:
    """Basic blocks in the order of their addresses; the first is the entry."""
    lines = [(int(a, 16), text.strip()) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    at = {address: n for n, (address, _) in enumerate(lines)}
    assert len(at) == len(lines), "more than one function"
    targets: dict[int, int] = {}
    starts = {0}
    for n, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump:
            targets[n] = at[int(jump[1], 16)]
            starts |= {targets[n], n + 1}
        elif re.match(r"(?:EXIT|RET|BRX)\b", text):
            starts.add(n + 1)
    bounds = [*sorted(starts - {len(lines)}), len(lines)]
    number = {first: i for i, first in enumerate(bounds)}
    found = []
    for first, end in pairwise(bounds):
        last = lines[end - 1][1]
        # a predicate stands before the instruction, or is its first operand
        falls = not re.match(r"(?:BRA\s+0x|EXIT|RET\b|BRX\b)", last) and end < len(lines)
        after = [number[targets[end - 1]]] if end - 1 in targets else []
        found.append(Block([text for _, text in lines[first:end]], after + [number[end]] * falls))
    table = [block for block in found if re.match(r"BRX\b", block.code[-1])]
    reached = reachable(found, 0)
    for n in range(len(found)):  # a jump through a table goes to what nothing else leads to
        if n not in reached:
            for block in table:
                block.after.append(n)
            reached |= reachable(found, n)
    return found


def reachable(graph: list[Block], start: int) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for n in graph[waiting.pop()].after:
            if n not in found:
                found.add(n)
                waiting.append(n)
    return found


def dominators(graph: list[Block]) -> list[set[int]]:
    """For every block the blocks that any way to it goes through, itself included."""
    before: list[list[int]] = [[] for _ in graph]
    for n, block in enumerate(graph):
        for m in block.after:
            before[m].append(n)
    everything = set(range(len(graph)))
    found = [{0}] + [everything] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(graph)):
            new = {n}.union(set.intersection(*(found[m] for m in before[n])) if before[n] else ())
            if new != found[n]:
                found[n], changed = new, True
    return found


def loops(graph: list[Block], over: list[set[int]]) -> dict[int, set[int]]:
    """Header -> blocks of every natural loop."""
    before: list[list[int]] = [[] for _ in graph]
    for n, block in enumerate(graph):
        for m in block.after:
            before[m].append(n)
    found: dict[int, set[int]] = {}
    for n, block in enumerate(graph):
        for header in block.after:
            if header in over[n]:
                body, waiting = found.setdefault(header, {header}), [n]
                while waiting:
                    m = waiting.pop()
                    if m not in body:
                        body.add(m)
                        waiting.extend(before[m])
    return found


def product_loops(graph: list[Block]) -> list[tuple[set[int], set[int]]]:
    """Every innermost loop that holds products: all of its blocks, and those of them that any turn may run.

    The others are the arms of branches that store to shared memory and hold no products: what a kernel over many tiles
    does once a tile, within its loop over blocks of keys.
    """
    over = dominators(graph)
    bodies = loops(graph, over)
    holding = {h: body for h, body in bodies.items() if any(graph[n].count(_PRODUCT) for n in body)}
    found = []
    for header, body in holding.items():
        if any(other < body for other in holding.values()):
            continue
        last = {n for n in body if header in graph[n].after}
        rare: set[int] = set()
        for n in body:
            for entry in over[n] & body if graph[n].count(_TO_SHARED) else ():
                arm = {m for m in body if entry in over[m]}
                if not arm & last and not any(graph[m].count(_PRODUCT) for m in arm):
                    rare |= arm
        found.append((body, body - rare))
    return found


def disassemble(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes, spilling instructions and tensor-core instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    graph = blocks(sass)
    inner = product_loops(graph)

    def most(sets) -> int:
        return max((sum(graph[n].count(_SPILL) for n in some) for some in sets), default=0)

    found = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "spills": sum(block.count(_SPILL) for block in graph),
        "loops": len(inner),
        "spills_in_loops": most(always for _, always in inner),
        "spills_in_whole_loops": most(body for body, _ in inner),
        "cp_async": len(re.findall(r"\bLDGSTS\b", sass)),
    }
    return found | {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX if re.search(rf"\b{name}\b", sass)}

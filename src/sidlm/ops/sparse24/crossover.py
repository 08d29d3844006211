"""From how many tokens on the sparse products pay: below, the dense ones compute the same function faster.

Each entry is a measurement of `benchmarks/sparse24.py` (whole layer, forward and backward, packing included), written
by it; what it was measured on is in benchmarks/results.
"""

from typing import NamedTuple


class Crossover(NamedTuple):
    device: str
    """as torch.cuda.get_device_name has it"""
    fp8: bool
    features: int
    width: int
    """d of x and of the result"""
    tokens: int
    """the smallest number measured at which 2:4 sparsity is faster, and at all above"""


NEVER = 1 << 62
"""tokens, where 2:4 sparsity was faster at no size"""

TABLE: tuple[Crossover, ...] = ()

ASSUMED = 4096
"""tokens, where nothing was measured"""


def tokens(device: str, fp8: bool, features: int) -> int:
    """The crossover of the entry for this device and precision whose features are nearest; ASSUMED if there is none."""
    known = [x for x in TABLE if (x.device, x.fp8) == (device, fp8)]
    return min(known, key=lambda x: abs(x.features - features)).tokens if known else ASSUMED

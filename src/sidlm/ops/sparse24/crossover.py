"""From how many tokens on sparse products pay: below, dense ones of the unpacked operands are faster.

The function is the same. Each entry is a measurement of `benchmarks/sparse24.py` (a layer, forward and backward), which
prints it; what it was measured on is in benchmarks/results.
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
    """the smallest number measured at which sparse products are faster, and at all above"""


NEVER = 1 << 62
"""tokens, where sparse products were faster at no size"""

TABLE: tuple[Crossover, ...] = ()

ASSUMED = 4096
"""tokens, where nothing was measured"""


def tokens(device: str, fp8: bool, features: int) -> int:
    """The crossover of the entry for this device and precision whose features are nearest; ASSUMED if there is none."""
    known = [x for x in TABLE if (x.device, x.fp8) == (device, fp8)]
    return min(known, key=lambda x: abs(x.features - features)).tokens if known else ASSUMED

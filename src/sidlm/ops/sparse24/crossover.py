"""From how many tokens on sparse products pay: below, products are dense and nothing is packed for them.

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
    inference: int
    """the smallest number measured at which products with packed activations are faster, and at all above, where
    nothing is kept for gradients"""
    tokens: int
    """the same for a forward and a backward pass"""
    weights: int
    """the same for gradients of the weights, for which activations are transposed and packed anew"""


NEVER = 1 << 62
"""tokens, where sparse products were faster at no size"""

TABLE: tuple[Crossover, ...] = (
    # benchmarks/results/sparse24_h200_layers.json, of which benchmarks/sparse24.py --replot prints them
    Crossover("NVIDIA H200", False, 21504, 4096, 512, 2048, 2048),
    Crossover("NVIDIA H200", True, 21504, 4096, 1024, 2048, 8192),
)

ASSUMED, ASSUMED_STEP = 8192, 16384
"""tokens forward and for a step, where nothing was measured. Of narrower layers there is one size, 8192 tokens with
F 8192 and d 2048 (benchmarks/results/sparse24_h200_layers_second.json): packing was a fifth faster forward, as a step
3% faster in bfloat16 and 9% slower in e4m3."""


def nearest(device: str, fp8: bool, features: int) -> Crossover:
    """The entry for this device and precision whose features are nearest, or what is assumed.

    What packing costs for each product falls with the layer's width: of layers with less than half of the features of
    one that was measured that one says nothing.
    """
    known = [x for x in TABLE if (x.device, x.fp8) == (device, fp8) and x.features <= 2 * features]
    assumed = Crossover(device, fp8, features, 0, ASSUMED, ASSUMED_STEP, ASSUMED_STEP)
    return min(known, key=lambda x: abs(x.features - features), default=assumed)


def steps(device: str, fp8: bool) -> str:
    """Features and tokens of all entries that a step of this device and precision may go by."""
    known = [f"{x.features}: {x.tokens}" for x in TABLE if (x.device, x.fp8) == (device, fp8)]
    return ", ".join([*known, f"else {ASSUMED_STEP}"])

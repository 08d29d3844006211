"""The CUDA kernels for wide groups compile for sm_90a without spills in their loops, and fit it; no device.

What they compute is tested on one (test_simplicial_cuda.py): nothing here emulates CUDA C++.
"""

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from ops.sass import Cubins
from sidlm.ops.simplicial import hopper_wide, prepare
from sidlm.ops.simplicial.hopper_wide import Variant

PLAIN = Variant(
    d=128, fp16=False, out_fp16=False, determinant=False, k2_bias=False, v2_bias=False, has_docs=False, backward=False,
    cluster=2, slots=5,
)  # fmt: skip
BACKWARD = PLAIN._replace(backward=True, cluster=1, slots=4)
VARIANTS = {
    "forward": PLAIN,
    "forward determinant": PLAIN._replace(determinant=True, v2_bias=True, slots=4),
    "forward small": PLAIN._replace(d=64, fp16=True, out_fp16=True, has_docs=True, k2_bias=True, cluster=1),
    "backward": BACKWARD,
    "backward small": BACKWARD._replace(d=64, fp16=True, has_docs=True, k2_bias=True, v2_bias=True),
}
SHARED = 227 << 10  # of a block on sm_90


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return Cubins(tmp_path_factory.mktemp("cubin"), {name: v.source for name, v in VARIANTS.items()})


@pytest.mark.parametrize("name", VARIANTS)
def test_it_multiplies_by_wgmma_that_is_not_waited_for(name, dump):
    """ptxas puts a wait behind each product where it takes registers of products in flight to be read."""
    sass, variant = dump(name, "-sass"), VARIANTS[name]
    kind = r"HGMMA\.64x\d+x16\.F32" + (r"\.BF16" if not variant.fp16 else " ")
    loop = sass[sass.index("HGMMA") : sass.rindex("HGMMA")]
    products = len(re.findall(kind, sass))
    scores, sums = variant.d // 16 * (1 + variant.backward), variant.keys // 16
    assert products == 2 * (scores + sums)  # once before the loop or after it, and in it
    assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) == 4
    assert not re.findall(r"\b(?:STL|LDL|MEMBAR\.(?:SC|GPU|SYS))", loop)  # nothing spilled, no fence of the device


def test_every_variant_fits_shared_memory():
    for d, determinant, backward in itertools.product((64, 128), (False, True), (False, True)):
        slots = 4 if determinant or backward else 5
        assert PLAIN._replace(d=d, determinant=determinant, backward=backward, slots=slots).shared <= SHARED


def test_the_barriers_are_the_last_in_shared_memory():
    """The launch asks for as much as the kernel lays out."""
    source = PLAIN.source
    assert "#define KEYS 128" in source and "#define KEYS 64" in BACKWARD.source
    for variant in VARIANTS.values():
        stages, barriers = 3, 8 * (2 * variant.slots + 2 * 3)
        copies, sets = 1 + variant.determinant, 1 + (variant.determinant or variant.backward)
        stage = (8 * (copies + 1) + 16 * sets) * (2 * variant.d + 16) + 16 + (128 if variant.backward else 0)
        slot = variant.d // 64 * variant.keys * 128 * (2 if variant.backward else 1)
        assert variant.shared == variant.slots * slot + 256 * variant.d + stages * stage + 512 + barriers


@pytest.mark.parametrize(("heads", "groups", "wide"), [(16, 1, True), (64, 2, True), (8, 1, False), (48, 2, False)])
def test_groups_of_sixteen_heads(heads, groups, wide):
    q, k = torch.empty(1, 3, heads, 64), torch.empty(1, 3, groups, 64)
    p = prepare.problem(q, k, k, k, k, 2, 2, "trilinear", 0.0, 0.0)
    assert hopper_wide.takes(p) is wide

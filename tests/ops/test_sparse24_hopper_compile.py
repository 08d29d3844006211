"""The CUDA kernel for products of packed operands compiles for sm_90a, fits it and uses its sparse tensor cores."""

import re

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from ops.sass import Cubins
from sidlm.ops import nvrtc
from sidlm.ops.sparse24.hopper_product import FEW, PACKING, SHAPES, Variant

SHAPE = [{"bn": bn, "blocks": blocks} for bn, blocks in SHAPES]
VARIANTS = {
    "e4m3": Variant(True, 1, scaled=True),
    "e4m3, fewer stages": Variant(True, 1, scaled=True, stages=4),
    **{f"bf16 {s['bn']}": Variant(True, 2, **s) for s in SHAPE},
    **{f"bf16 turned {s['bn']}": Variant(True, 2, turned=True, **s) for s in SHAPE},
    "fp16": Variant(True, 2, fp16=True),
    "packing": PACKING,
    "few": FEW,
}
INSTRUCTION = {
    "e4m3": r"QGMMA\.SP\.64x256x64\.F32\.E4M3\.E4M3",
    "bf16": r"HGMMA\.SP\.64x(256|192)x32\.F32\.BF16",
    "fp16": r"HGMMA\.SP\.64x256x32\.F32 ",
    "packing": r"HGMMA\.64x192x16\.F32\.BF16",
    "few": r"QGMMA\.64x192x32\.F32\.E4M3\.E4M3",
}
SHARED = 227 << 10  # of a block on sm_90
STACK = 16  # bytes of a thread that may be spilled: of the largest tile, where a result leaves


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return Cubins(tmp_path_factory.mktemp("cubin"), {name: v.source for name, v in VARIANTS.items()})


@pytest.mark.parametrize("name", VARIANTS)
def test_it_fits_and_multiplies_by_wgmma(name, dump):
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump(name, "-res-usage")))
    assert VARIANTS[name].shared <= SHARED
    assert int(usage["LOCAL"]) == 0 and int(usage["STACK"]) <= STACK, usage
    sass = dump(name, "-sass")
    assert len(re.findall(INSTRUCTION[name.split(",")[0].split(" ")[0]], sass)) >= 4
    loop = sass[sass.index("GMMA") : sass.rindex("GMMA")]
    assert not re.findall("MEMBAR|CCTL|STL|LDL", loop)  # nothing spilled, and no fence of the whole device, in between


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r'identifier "nothing" is undefined'):
        nvrtc.compiled('extern "C" __global__ void kernel() { nothing(); }')

"""A packed matrix for tests of products, and a cache of their own for what is chosen and searched."""

import pytest
import torch

from sidlm.ops.sparse24 import algorithms, backends, cusparselt, gpu
from sidlm.ops.sparse24.packed import pack, unpack
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.select import select_2to4
from sidlm.ops.sparse24.triton_relayout import relayout

DTYPES = [torch.bfloat16, FP8]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SID_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SID_IMPL", raising=False)
    monkeypatch.setattr(algorithms, "_known", {})
    caches = (backends.failure, backends._choose, cusparselt._machine, gpu._preferred)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def packed_example(m=128, k=256, dtype=torch.bfloat16, seed=0):
    """A packed matrix in the plain layout, with scales for e4m3, and its dense form in float32."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    p = pack(x, select_2to4(x, by="magnitude"))
    p = p._replace(values=p.values.to(dtype), scale=torch.exp2(torch.arange(m) % 5 - 2.0) if dtype == FP8 else None)
    return p, unpack(p._replace(values=p.values.float()))


def relaid(metadata, layout, rows=None):
    """Plain metadata in the order of that name, of more rows if told."""
    tiled = torch.full((rows or len(metadata), metadata.shape[1]), 0xAA, dtype=torch.uint8)
    relayout(metadata, tiled, layout)
    return tiled

"""cuSPARSELt, with the library replaced by what it does: its algorithms, searched and remembered. No device needed."""

import json

import pytest
import torch

pytest.importorskip("triton")

from ops.sparse24_products import DTYPES, own_cache, packed_example, relaid  # noqa: F401 - a fixture
from sidlm.ops import squared_relu_ffn
from sidlm.ops.sparse24 import algorithms, api, backends, crossover, cusparselt, gpu
from sidlm.ops.sparse24.packed import Packed, unpack
from sidlm.ops.sparse24.quantize import FP8, quantize_rows
from sidlm.ops.sparse24.triton_relayout import restored

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Library:
    """`torch._cslt_sparse_mm` on the CPU: reads values and metadata from one matrix; some algorithms are wrong."""

    def __init__(self, wrong=(), milliseconds=None, count=6):
        self.wrong, self.count, self.used = wrong, count, []
        self.milliseconds = milliseconds or {i: 10 - i for i in range(count)}

    def __call__(self, sparse, b, *, alg_id, out_dtype=None):
        assert sparse.is_contiguous() and sparse.ndim == 2
        if alg_id >= self.count:
            raise RuntimeError("invalid value")
        size = sparse.itemsize
        if size == 1:
            assert b.T.is_contiguous() and not b.is_contiguous() and out_dtype == torch.bfloat16
        else:
            assert (b.is_contiguous() or b.T.is_contiguous()) and out_dtype is None
        self.used.append(alg_id)
        (m, width), k = sparse.shape, len(b)
        assert width * size == k // 2 * size + k // 8
        flat = sparse.flatten()
        values, rest = flat[: m * k // 2].view(m, -1), flat[m * k // 2 :].view(torch.uint8).view(m, -1)
        plain = restored(rest, cusparselt.LAYOUTS[size], m)
        out = unpack(Packed(values.float(), plain)) @ b.float()
        if alg_id in self.wrong:
            out[m // 2] *= 1.5
        return out.to(out_dtype or sparse.dtype)

    def time(self, function, repeats):
        function()
        return self.milliseconds[self.used[-1]]


@pytest.fixture
def library(monkeypatch):
    def install(**kwargs):
        made = Library(**kwargs)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", made)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
        monkeypatch.setattr(algorithms, "device_time", made.time)
        return made

    return install


@pytest.mark.parametrize("dtype", DTYPES)
def test_cusparselt_gets_one_matrix_and_leaves_the_scales(library, dtype):
    library()
    p, dense = packed_example(dtype=dtype)
    p = p._replace(metadata=relaid(p.metadata, cusparselt.LAYOUTS[dtype.itemsize]))
    b = torch.randn(48, 256)
    b, scale = quantize_rows(b) if dtype == FP8 else (b.to(dtype), None)
    for order in (b, b.T.contiguous().T, torch.cat((b, b), 1)[:, :256]):
        product = cusparselt.multiply(p, order, scale)
        assert product is not None and product.rows is p.scale and product.columns is scale
        values = product.values.float()
        if scale is not None:
            values = values * product.rows[:, None] * product.columns
        want = dense @ (b.float() if scale is None else b.float() * scale[:, None]).T
        torch.testing.assert_close(values, want, rtol=0.01, atol=0.01 * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_blob_is_a_view_where_metadata_lies_behind_the_values(dtype):
    p, _ = packed_example(dtype=dtype)
    whole = cusparselt.blob(p)
    copied = whole.flatten().view(torch.uint8)
    assert torch.equal(copied[: p.values.nbytes], p.values.view(torch.uint8).flatten())
    assert torch.equal(copied[p.values.nbytes :], p.metadata.flatten())
    values = whole.flatten()[: p.values.numel()].view(p.values.shape)
    metadata = whole.flatten()[p.values.numel() :].view(torch.uint8).view(p.metadata.shape)
    again = cusparselt.blob(Packed(values, metadata))
    assert again.data_ptr() == whole.data_ptr() and again.shape == whole.shape
    assert torch.equal(again.view(torch.uint8), whole.view(torch.uint8))
    # elsewhere in the same memory is not behind
    apart = torch.cat((copied, copied[p.values.nbytes :]))
    metadata = apart[len(copied) :].view(p.metadata.shape)
    values = apart[: p.values.nbytes].view(dtype).view(p.values.shape)
    assert cusparselt.blob(Packed(values, metadata)).data_ptr() != apart.data_ptr()


def product_of(size=128):
    p, _ = packed_example()
    p = p._replace(metadata=relaid(p.metadata, "cusparselt_16bit"))
    return cusparselt.multiply(p, torch.ones(size, 256, dtype=torch.bfloat16), None)


def test_the_fastest_right_algorithm_is_searched_once(library):
    made = library(wrong=(5, 4), milliseconds={0: 9, 1: 3, 2: 2, 3: 4, 4: 0.1, 5: 0.2})
    product_of()
    assert made.used[-1] == 2 and set(made.used) == set(range(6))
    made.used.clear()
    product_of()
    product_of(120)  # of the same bucket
    assert made.used == [2, 2]
    (machine,) = json.loads(algorithms.path().read_text()).values()
    assert machine == {"bfloat16 128 x 256 x 128": 2}


def test_each_order_of_b_has_an_algorithm_of_its_own(library):
    made = library()
    p, _ = packed_example()
    p = p._replace(metadata=relaid(p.metadata, "cusparselt_16bit"))
    b = torch.ones(128, 256, dtype=torch.bfloat16)
    for order in (b, b.T.contiguous().T):
        made.used.clear()
        cusparselt.multiply(p, order, None)
        assert len(made.used) > 6
    assert set(*map(set, json.loads(algorithms.path().read_text()).values())) == {
        "bfloat16 128 x 256 x 128", "bfloat16 128 x 256 x 128 transposed"
    }  # fmt: skip


def test_what_is_on_disk_is_used_by_the_next_process(library, monkeypatch):
    made = library()
    product_of()
    monkeypatch.setattr(algorithms, "_known", {})
    made.used.clear()
    product_of()
    assert len(made.used) == 1
    cusparselt._machine.cache_clear()
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)  # another library: others are faster
    product_of()
    assert len(made.used) > 6 and len(json.loads(algorithms.path().read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 3}', '{"a": {"b": "4"}}', '{"a": {"b": -1, "c": true}}'])
def test_a_broken_file_is_no_file(library, text):
    algorithms.path().parent.mkdir(parents=True)
    algorithms.path().write_text(text)
    assert not any(algorithms._load().values())
    library()
    assert product_of() is not None
    assert [x for x in json.loads(algorithms.path().read_text()).values() if x]
    assert not list(algorithms.path().parent.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_a_search(library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SID_CACHE", str(tmp_path / "file"))
    library()
    assert product_of() is not None


def test_no_right_algorithm_means_no_product(library):
    library(wrong=range(6))
    assert product_of() is None and not algorithms.path().exists()


def test_an_algorithm_that_is_right_only_at_first_is_not_taken():
    calls = [0, 0, 0]

    def run(algorithm):
        if algorithm > 2:
            raise RuntimeError("invalid value")
        calls[algorithm] += 1
        return torch.tensor([algorithm == 1 and calls[1] > 1])

    def time(function, repeats):
        before = calls.copy()
        function()
        return [3.0, 1.0, 2.0][next(i for i in range(3) if calls[i] > before[i])]

    assert algorithms.search(run, lambda wrong: not wrong.item(), time) == 2


def test_algorithms_that_cannot_do_this_product_do_not_end_the_search():
    def run(algorithm):
        if algorithm in (0, 1, 3) or algorithm > 4:
            raise RuntimeError("not supported")
        return torch.tensor([0.0])

    assert algorithms.search(run, lambda x: True, lambda function, repeats: 1.0) in (2, 4)


def test_a_known_algorithm_that_is_refused_gives_way_to_the_default(library):
    made = library()
    product_of()
    made.count = 1
    assert product_of() is not None and made.used[-1] == 0


def test_nothing_is_timed_while_a_graph_is_captured(library, monkeypatch):
    made = library()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert product_of() is not None and made.used == [0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    product_of()
    assert len(made.used) > 6


def test_buckets():
    assert [algorithms.bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 64, 65, 96, 97, 8192, 21504, 43008)] == [
        1, 2, 3, 4, 6, 6, 8, 64, 96, 96, 128, 8192, 24576, 49152
    ]  # fmt: skip


@pytest.mark.parametrize("tokens, features", [(3, 128), (40, 128), (40, 72)])
def test_op_over_cusparselt_is_eager_s(library, monkeypatch, tokens, features):
    made = library(count=1)
    monkeypatch.setitem(
        backends.BACKENDS, "cusparselt", backends.BACKENDS["cusparselt"]._replace(why_not=lambda device, dtype: None)
    )
    monkeypatch.setattr(crossover, "ASSUMED", 0)
    monkeypatch.setattr(crossover, "ASSUMED_STEP", 0)
    monkeypatch.setitem(
        api.IMPLEMENTATIONS, "triton", api.IMPLEMENTATIONS["triton"]._replace(why_not=lambda device, dtype: None)
    )
    piece = gpu._piece  # its memory poisoned: rows of padding are in the product that algorithms are judged by
    monkeypatch.setattr(
        gpu, "_piece", lambda *args: [x.view(torch.uint8).fill_(255).view(x.dtype) for x in piece(*args)]
    )
    assert backends.why_not("cusparselt", CPU, torch.bfloat16) is None
    made.used.clear()
    algorithms.path().unlink()
    make = torch.Generator().manual_seed(0)
    shapes = ((tokens, 48), (features, 48), (32, features))
    inputs = [torch.randn(s, generator=make).mul(0.3).bfloat16().requires_grad_() for s in shapes]
    results = []
    for impl in ("triton", "eager"):
        share = 0.3 if impl == "triton" or features % gpu.FEATURES == 0 else 1.0  # nothing packed: exact gradients
        out = squared_relu_ffn(*inputs, sparsity="2:4", dense_features=share, impl=impl)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for mine, eager in zip(*results, strict=True):
        assert mine.stride() == eager.stride()
        torch.testing.assert_close(mine.float(), eager.float(), rtol=0.02, atol=0.01 * eager.abs().max().item())
    found = [shape for shapes in algorithms._load().values() for shape in shapes]
    assert len(found) == (4 if features % 64 == 0 else 0) == len(set(made.used)) * 4

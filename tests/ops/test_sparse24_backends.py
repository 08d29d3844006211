"""Sparse products by the machine's libraries: which is taken, and that a wrong one never is. No device needed."""

import pytest
import torch

pytest.importorskip("triton")

from ops.sparse24_products import DTYPES, own_cache, packed_example, relaid  # noqa: F401 - a fixture
from sidlm.ops.sparse24 import backends, crossover, cusparselt, products
from sidlm.ops.sparse24.packed import unpack
from sidlm.ops.sparse24.quantize import FP8, quantize_rows
from sidlm.ops.sparse24.triton_relayout import restored

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_reasons_name_what_is_missing(monkeypatch):
    assert backends.why_not("cusparselt", CPU, torch.bfloat16) == "needs a CUDA device"
    assert "not torch.float32" in backends.why_not("cusparselt", CUDA, torch.float32)
    assert "not torch.float32" in backends.why_not("dense", CPU, torch.float32)
    assert "float8_e4m3fn, not torch.bfloat16" in backends.why_not("torchao", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "sm_100" in backends.why_not("cusparselt", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "no cuSPARSELt" in backends.why_not("cusparselt", CUDA, FP8)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.why_not("torchao", CUDA, FP8) == "torchao is not installed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_backend_is_right_and_the_one_here(dtype):
    assert backends.failure("dense", CPU, dtype) is None
    assert backends.choose(CPU, dtype, 1 << 20, 1 << 14) == "dense"


def dense_with(change, only_transposed=False):
    """The dense backend, on the CPU under the name of another, with its product changed."""

    def multiply(p, b, b_scale):
        plain = restored(p.metadata, "cusparselt_8bit" if b_scale is not None else "cusparselt_16bit", len(p.values))
        product = backends.BACKENDS["dense"].multiply(p._replace(metadata=plain), b, b_scale)
        return product if only_transposed and b.is_contiguous() else change(product)

    return backends.BACKENDS["cusparselt"]._replace(why_not=lambda device, dtype: None, multiply=multiply)


def one_wrong_value(product):
    product.values[17, 3] += product.values[17].float().norm()
    return product


def not_a_number(product):
    product.values[200, 5] = torch.nan
    return product


def transposed_factors(product):
    return product._replace(columns=torch.full_like(product.values[0].float(), 1.5))


def raises(product):
    raise RuntimeError("operation not supported\nwhen calling something")


def raises_without_words(product):
    raise ValueError


BROKEN = {
    one_wrong_value: "computed a small product wrong",
    not_a_number: "computed a small product wrong",
    transposed_factors: "computed a small product wrong",
    raises: "failed on a small product: RuntimeError: operation not supported",
    raises_without_words: "failed on a small product: ValueError",
    lambda product: None: "failed on a small product: RuntimeError: no algorithm computes it right",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", BROKEN)
def test_a_backend_that_computes_wrong_numbers_is_refused(change, dtype, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cusparselt", dense_with(change))
    assert BROKEN[change] in backends.why_not("cusparselt", CPU, dtype)
    assert backends.choose(CPU, dtype, 1 << 20, 1 << 14) == "dense"
    monkeypatch.setenv("SID_IMPL", "sparse24_product=cusparselt,sparse24_product_fp8=cusparselt")
    with pytest.raises(ValueError, match=r"cannot run here: .* small product"):
        backends.choose(CPU, dtype, 1 << 20, 1 << 14)


def test_a_backend_is_tried_with_both_orders_of_b(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cusparselt", dense_with(one_wrong_value, only_transposed=True))
    assert backends.why_not("cusparselt", CPU, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_by_sizes_and_name(dtype, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cusparselt", dense_with(lambda product: product))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(
        crossover, "TABLE", (crossover.Crossover("some GPU", dtype == FP8, 8192, 2048, 512, 1024, 2048),)
    )
    choose = lambda tokens, features: backends.choose(CPU, dtype, tokens, features)  # noqa: E731
    assert backends.why_not("cusparselt", CPU, dtype) is None
    assert [choose(tokens, 8192) for tokens in (896, 1024, 4096)] == ["dense", "cusparselt", "cusparselt"]
    assert choose(4096, 8200) == "dense" and choose(4100, 8192) == "dense"  # no multiples of 64
    monkeypatch.setenv("SID_IMPL", "sparse24_product=cusparselt, sparse24_product_fp8=cusparselt")
    assert choose(128, 8192) == "cusparselt" and choose(128, 8200) == "dense"
    monkeypatch.setenv("SID_IMPL", "sparse24_product=dense,sparse24_product_fp8=dense")
    assert choose(4096, 8192) == "dense"


def test_crossover_is_that_of_the_nearest_features(monkeypatch):
    rows = [
        ("A", True, 8192, 2048, 50, 100, 150),
        ("A", True, 43008, 8192, 60, 200, 250),
        ("A", False, 8192, 2048, 70, 300, 350),
    ]
    monkeypatch.setattr(crossover, "TABLE", tuple(crossover.Crossover(*row) for row in rows))
    assert [crossover.nearest("A", True, f) for f in (4096, 16384, 30000)] == [rows[0], rows[0], rows[1]]
    assert crossover.nearest("A", False, 43008) == rows[2]
    for asked in (("A", True, 4095), ("B", True, 8192)):
        assert crossover.nearest(*asked)[4:] == (crossover.ASSUMED, crossover.ASSUMED_STEP, crossover.ASSUMED_STEP)


def test_entries_of_the_crossover_table_are_whole():
    for entry in crossover.TABLE:
        assert entry.inference >= 64 and 64 <= entry.tokens <= entry.weights
        assert entry.features % 64 == 0 and entry.device.startswith("NVIDIA")
    assert len({(x.device, x.fp8, x.features) for x in crossover.TABLE}) == len(crossover.TABLE)


def test_difference_sees_one_wrong_tile_and_nan():
    want = torch.randn(512, 4096)
    want[7] = 0
    assert products.difference(want.bfloat16(), want) < 0.005
    wrong = want.clone()
    wrong[128:192, 256:512] = want[128:192, :256]
    assert products.difference(wrong, want) > 10 * cusparselt.TOLERANCE
    wrong = want.clone()
    wrong[7, 3] = 1.0
    assert products.difference(wrong, want) > cusparselt.TOLERANCE
    wrong[7, 3] = torch.nan
    assert products.difference(wrong, want) == 1.0


@pytest.mark.parametrize("m, k, n", [(5, 24, 40), (16, 32, 48), (3, 8, 7)])
def test_products_of_any_size_reach_scaled_mm_in_its_multiples(m, k, n, monkeypatch):
    def scaled_mm(a, b, a_scale, b_scale, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.T.is_contiguous() and a.dtype == b.dtype == FP8
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert a_scale.shape == (len(a), 1) and b_scale.shape == (1, b.shape[1])
        assert a_scale.is_contiguous() and b_scale.is_contiguous()
        return ((a.float() @ b.float()) * a_scale * b_scale).to(out_dtype)

    a, b = quantize_rows(torch.randn(m, k)), quantize_rows(torch.randn(k, n).T)
    want = products.dense_product(*a, *b)
    monkeypatch.setattr(products, "_multiplies_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    got = products.dense_product(*a, *b)
    assert got.shape == (m, n) and torch.equal(got, want)
    assert products.dense_product(a[0][:0], a[1][:0], *b).shape == (0, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_values(dtype):
    p, _ = packed_example(dtype=dtype)
    dense = unpack(p._replace(values=p.values.float(), scale=None))
    assert torch.equal(products.dense_values(p).float(), dense)
    rows = torch.tensor([127, 0, 64])
    assert torch.equal(products.dense_values(p, rows).float(), dense[rows])

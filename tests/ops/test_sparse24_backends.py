"""Sparse products by the machine's libraries: which is taken, and that a wrong one never is. No device needed."""

import json

import pytest
import torch

pytest.importorskip("triton")

from sidlm.ops import squared_relu_ffn
from sidlm.ops.sparse24 import algorithms, api, backends, crossover, cusparselt, gpu, products
from sidlm.ops.sparse24.layouts import to_layout
from sidlm.ops.sparse24.packed import Packed, pack, unpack
from sidlm.ops.sparse24.quantize import FP8, quantize_rows
from sidlm.ops.sparse24.select import select_2to4
from sidlm.ops.sparse24.triton_relayout import LAYOUTS, relayout, restored

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
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


# which backend, and why not


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


# cuSPARSELt, with the library replaced by what it does


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


# dense products and the comparison


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


# kernels of the dense sides, in Triton's interpreter


def poisoned(*shape, dtype):
    """Memory in which what is not written is seen."""
    return torch.full(shape, torch.nan, dtype=torch.float32).to(dtype)


def factors(product, rows, columns):
    """A product with powers of two for its rows and columns, and what it is with them: nothing is rounded."""
    row, column = (torch.exp2(torch.randint(-9, 9, (n,)).float()) for n in product.shape)
    row, column = row if rows else None, column if columns else None
    want = product.float() * (1.0 if row is None else row[:, None]) * (1.0 if column is None else column)
    return products.Product(product, row, column), want


FACTORS = [(True, True), (False, True), (True, False), (False, False)]


@pytest.mark.parametrize("rows, columns", FACTORS)
def test_rescaled(rows, columns):
    from sidlm.ops.sparse24.triton_rescale import rescaled

    whole = torch.randn(90, 131).bfloat16()
    for values in (whole, whole[:70], whole.T.contiguous().T):
        before = values.clone()
        product, want = factors(values, rows, columns)
        got = rescaled(product)
        assert got.is_contiguous() and torch.equal(got.float(), want)
        assert (got.data_ptr() == values.data_ptr()) == values.is_contiguous()
        assert values.is_contiguous() or torch.equal(values, before)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows, columns", FACTORS)
@pytest.mark.parametrize("m, k", [(70, 29), (70, 0), (1, 64)])
def test_products_are_put_into_place(rows, columns, turned, m, k):
    from sidlm.ops.sparse24.triton_rescale import place

    first, want = factors(torch.randn(m, 131).bfloat16(), rows, columns)
    second = torch.randn(k, 131).bfloat16()
    into = poisoned(131, m + k, dtype=torch.bfloat16).T if turned else poisoned(m + k, 131, dtype=torch.bfloat16)
    source = torch.randperm(m + k)
    place(into, source.int(), first, second if k else None)
    assert torch.equal(into.float(), torch.cat((want, second.float()))[source])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_quantised_as_by_torch(dtype):
    """Of values that e4m3 has: how others are rounded is the device's affair, which the interpreter does not have."""
    from sidlm.ops.sparse24.triton_quantize import quantize_rows as kernel

    exact = torch.randn(9, 300).mul(40).to(FP8).float()
    exact[:, 7] = 448
    x = (exact * torch.exp2(torch.arange(9) - 12.0)[:, None]).to(dtype)
    x[2] = 0
    for given in (x, x[:, :256], x[::2]):
        (values, scale), (want, want_scale) = kernel(given), quantize_rows(given)
        assert torch.equal(scale, want_scale) and torch.equal(values.float(), want.float())
    x = x.float()
    x[3, 5], x[4, 299], x[5] = torch.inf, torch.nan, -x[5].abs()
    assert torch.equal(kernel(x.to(dtype))[1].nan_to_num(-1), quantize_rows(x.to(dtype))[1].nan_to_num(-1))
    assert kernel(x)[1].isnan().tolist() == [i in (3, 4) for i in range(9)]
    assert kernel(x[:, :0])[1].tolist() == [1.0] * 9
    with pytest.raises(ValueError, match="stride 9"):
        kernel(x.T.contiguous().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_kernel(dtype):
    from sidlm.ops.sparse24.triton_unpack import unpack_rows

    p, _ = packed_example(67, 520, dtype)
    dense = unpack(p._replace(values=p.values.float(), scale=None))
    assert torch.equal(unpack_rows(p.values, p.metadata).float(), dense)
    rows = torch.tensor([66, 0, 40])
    assert torch.equal(unpack_rows(p.values, p.metadata, rows).float(), dense[rows])


# orders of the metadata


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "m, k, rows", [(64, 128, 64), (128, 256, 128), (192, 1280, 192), (128, 384, 100), (64, 128, 1)]
)
def test_relayout_and_back(layout, m, k, rows):
    plain = torch.randint(0, 256, (rows, k // 8), dtype=torch.uint8)
    tiled = relaid(plain, layout, m)
    whole = torch.cat((plain, plain.new_full((m - rows, k // 8), 0x44)))  # some two of four: anything else is undefined
    assert torch.equal(tiled.flatten(), to_layout(whole, layout).flatten())
    assert torch.equal(restored(tiled, layout, rows), plain)


# the whole operator, over the library that wants values and metadata in one piece


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

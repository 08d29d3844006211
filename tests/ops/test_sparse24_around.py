"""The kernels around 2:4 products in Triton's interpreter: quantising, scales, places, orders of metadata."""

import pytest
import torch

pytest.importorskip("triton")

from ops.sparse24_products import DTYPES, own_cache, packed_example, relaid  # noqa: F401 - a fixture
from sidlm.ops.sparse24 import products
from sidlm.ops.sparse24.layouts import to_layout
from sidlm.ops.sparse24.packed import unpack
from sidlm.ops.sparse24.quantize import FP8, quantize_rows
from sidlm.ops.sparse24.triton_relayout import LAYOUTS, restored


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

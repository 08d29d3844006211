"""Causal attention: torch's kernels against the definition, with windows, documents and padding."""

import pytest
import torch

from sidlm.ops import attention, attention_mask


@pytest.mark.parametrize("steps, length", [(17, 17), (1, 20), (4, 9)])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("docs", [False, True])
def test_sdpa_equals_definition(steps, length, window, docs):
    torch.manual_seed(steps + length)
    q = torch.randn(2, steps, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, length, 2, 8, dtype=torch.float64)
    ids = torch.randint(-1, 3, (2, length)).sort(dim=1).values if docs else None
    mine, oracle = (attention(q, k, v, window=window, doc_ids=ids, impl=i) for i in ("sdpa", "reference"))
    torch.testing.assert_close(mine, oracle, rtol=1e-12, atol=1e-12)
    if ids is not None:
        assert (mine[ids[:, -steps:] < 0] == 0).all()


def test_definition_sees_what_it_should():
    """Uniform weights: the output is the mean of the values a query sees."""
    k = torch.zeros(1, 6, 1, 4)
    v = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 1, 4)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    out = attention(k, k, v, window=2, doc_ids=ids, impl="reference")[0, :, 0, 0]
    assert out.tolist() == [0.0, 0.5, 1.5, 3.0, 3.5, 4.5]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_its_mask_function_under_type_checkers(monkeypatch):
    """FlexAttention as it is, not compiled: the checkers of these tests hide how many arguments a function takes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from sidlm.ops.attention import flex

    monkeypatch.setattr(flex, "_compiled", lambda: (flex_attention, create_block_mask))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, steps, heads, 16) for steps, heads in ((20, 4), (24, 2), (24, 2)))
    ids = torch.tensor([[0] * 9 + [1] * 15, [-1] * 7 + [0] * 17])
    for window, docs in ((None, ids), (6, ids), (6, None)):
        mask = flex.visible(20, 24, window, docs, q.device)
        mine, oracle = flex.attention(q, k, v, mask, None), attention(q, k, v, window=window, doc_ids=docs)
        seen = torch.ones(2, 20, dtype=torch.bool) if docs is None else docs[:, 4:] >= 0
        torch.testing.assert_close(mine[seen], oracle[seen], rtol=1e-5, atol=1e-5)


def test_mask_is_built_once_and_shared():
    q = torch.randn(1, 6, 2, 4)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    mask = attention_mask(6, 6, window=2, doc_ids=ids)
    assert torch.equal(attention(q, q, q, mask=mask), attention(q, q, q, window=2, doc_ids=ids))
    assert attention_mask(6, 6).visible is None and attention_mask(6, 6, window=6).visible is None
    assert attention_mask(1, 6).visible is None and attention_mask(1, 6, window=5).visible is not None


def test_documents_told_by_offsets(monkeypatch):
    """The way to the kernels for documents, which run on CUDA alone: here one document after the other stands in."""
    from sidlm.ops.attention import api, varlen

    def kernel(q, k, v, offsets, own, longest, _, *, scale, window_size, enable_gqa=False):
        assert q.shape[-1] % 8 == k.shape[-1] % 8 == 0
        assert torch.equal(own, offsets) and max(offsets.diff().tolist()) <= longest and window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        parts = [slice(a, b) for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False) if a < b]
        outs = [attention(q[None, p], k[None, p], v[None, p], window=window, scale=scale)[0] for p in parts]
        return torch.cat(outs)

    monkeypatch.setattr(varlen.kernels, "varlen_attn", kernel)
    usable = api.IMPLEMENTATIONS["varlen"]._replace(why_not=lambda device, dtype: None)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "varlen", usable)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 3], [0] * 7])
    padded = torch.tensor([[-1, -1, 0, 0, 1, 1, 1], [0] * 5 + [-1] * 2])
    offsets = (torch.tensor([0, 2, 5, 6, 7, 14, 14], dtype=torch.int32), 8)
    for window, doc_ids, told in ((None, ids, offsets), (2, ids, offsets), (2, ids, None), (3, padded, None),
                                  (3, None, None), (None, None, None)):  # fmt: skip
        mask = attention_mask(7, 7, window=window, doc_ids=doc_ids, offsets=told, impl="varlen")
        mine, oracle = attention(q, k, v, mask=mask), attention(q, k, v, window=window, doc_ids=doc_ids)
        for a, b in zip((mine, *torch.autograd.grad(mine.square().sum(), (q, k, v))),
                        (oracle, *torch.autograd.grad(oracle.square().sum(), (q, k, v))), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_the_environment_names_serves_masks_too(monkeypatch):
    monkeypatch.setenv("SID_IMPL", "attention=reference")
    assert attention_mask(6, 6, doc_ids=torch.zeros(1, 6, dtype=torch.int64)).impl == "reference"
    monkeypatch.setenv("SID_IMPL", "attention=varlen")
    with pytest.raises(ValueError, match="'varlen' cannot run here: torch's flash kernels for documents need CUDA"):
        attention_mask(6, 6)


def test_gradients_with_padding_are_finite():
    q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, doc_ids=torch.tensor([[-1, -1, 0, 0, 0, 0]]))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert all((g[:, :2] == 0).all() for g in grads)


def test_bad_input_is_named(unchecked):
    op = unchecked(attention)
    q = torch.randn(1, 6, 3, 4)
    k = torch.randn(1, 6, 2, 4)
    with pytest.raises(ValueError, match="q has 3 heads, not a multiple of the 2 heads of k"):
        op(q, k, k)
    with pytest.raises(ValueError, match="window is 0"):
        op(k, k, k, window=0)
    with pytest.raises(ValueError, match=r"doc_ids has shape \(1, 5\), expected \(1, 6\)"):
        op(k, k, k, doc_ids=torch.zeros(1, 5, dtype=torch.long))

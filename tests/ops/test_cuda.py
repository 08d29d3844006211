"""The implementations on a GPU against the oracle in float64."""

import jaxtyping
import pytest
import torch

from sidlm.ops import attention, attention_mask, linear_cross_entropy, two_simplicial_attention
from sidlm.ops.simplicial import api

pytestmark = pytest.mark.gpu


@pytest.fixture
def untraced(monkeypatch):
    """Call it before compiling: torch 2.11's compiler cannot trace the checkers of shapes that conftest.py installs."""
    return lambda: monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_eager_simplicial(form, dtype):
    """At most four times the error of the oracle in that dtype: half-precision products round u and the weights."""
    make = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 100, heads, 48, generator=make).to(dtype) for heads in (4, 2, 2, 2, 2)]
    ids = torch.randint(-1, 3, (2, 100), generator=make).sort(dim=1).values
    grad = torch.randn(2, 100, 4, 48, generator=make, dtype=torch.float64)

    def run(device, impl, dtype):
        ys = [x.to(device, dtype).requires_grad_() for x in xs]
        settings = {"window": (40, 9), "form": form, "k2_bias": 1.0, "v2_bias": 1.0}
        out = two_simplicial_attention(*ys, doc_ids=ids.to(device), impl=impl, **settings)
        grads = torch.autograd.grad(out, ys, grad.to(device, out.dtype))
        return [x.double().cpu() for x in (out.detach(), *grads)]

    exact = run("cpu", "reference", torch.float64)
    for e, own, mine in zip(exact, run("cuda", "reference", dtype), run("cuda", "eager", dtype), strict=True):
        assert (mine - e).norm() <= 4 * (own - e).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [48, 64, 300])
def test_the_default(unchecked, monkeypatch, dtype, dim):
    """The best kernel that takes the dtype, also in one graph of torch.compile."""
    ran, backend = [], api._backend
    monkeypatch.setattr(api, "_backend", lambda impl: ran.append(impl) or backend(impl))
    hopper = torch.cuda.get_device_capability() == (9, 0)
    expected = {torch.float64: "eager", torch.float32: "triton", torch.bfloat16: "hopper" if hopper else "triton"}
    impl = expected[dtype] if dim <= 256 else "eager"
    op = unchecked(two_simplicial_attention)
    make = torch.Generator().manual_seed(0)
    xs = [torch.randn(1, 50, heads, dim, generator=make).to("cuda", dtype) for heads in (16, 1, 1, 1, 1)]
    xs, ids = [x.requires_grad_() for x in xs], torch.arange(50, device="cuda")[None] // 20

    def loss(*xs):
        return op(*xs, window=(20, 8), v2_bias=1.0, doc_ids=ids).float().square().sum()

    torch.compiler.reset()
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ran.clear()
        grads = torch.autograd.grad(run(*xs), xs)
        assert ran == [impl, impl]
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("docs", [None, "ids", "offsets"])
@pytest.mark.parametrize("kv_heads, dim", [(2, 64), (8, 60)])
def test_attention_in_training_rows(untraced, window, docs, kv_heads, dim):
    """What each kind of row takes: within three times the error of torch's dense kernel in that precision."""
    make = torch.Generator().manual_seed(1)
    shapes = [(2, 256, heads, dim) for heads in (8, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=make).cuda().bfloat16().requires_grad_() for shape in shapes)
    grad = torch.randn(shapes[0], generator=make).cuda()
    ids, offsets = None, None
    if docs is not None:  # of one token, of a whole row, and empty ones at the end
        cuts = [torch.tensor([0] + [1] * 100 + [2] * 154 + [3]), torch.zeros(256, dtype=torch.int64)]
        ids = torch.stack(cuts).cuda()
    if docs == "offsets":
        offsets = (torch.tensor([0, 1, 101, 255, 256, 512, 512, 512], dtype=torch.int32).cuda(), 256)
    mask = attention_mask(256, 256, window=window, doc_ids=ids, offsets=offsets, device="cuda", dtype=q.dtype)
    plain = "sdpa" if window is None else "varlen"
    assert mask.impl == {None: plain, "ids": "flex", "offsets": "varlen"}[docs]

    def run(mask, impl, xs):
        out = attention(*xs, window=window, doc_ids=ids, mask=mask, impl=impl)
        return [x.double() for x in (out.detach(), *torch.autograd.grad(out, xs, grad.to(out.dtype)))]

    exact = run(None, "reference", [x.detach().double().requires_grad_() for x in (q, k, v)])
    own = run(None, "sdpa", [q, k, v])
    for e, o, m in zip(exact, own, run(mask, None, [q, k, v]), strict=True):
        assert (m - e).norm() <= 3 * (o - e).norm()
    untraced()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask=mask), fullgraph=True)(q, k, v)
    assert (compiled - exact[0]).norm() <= 3 * (own[0] - exact[0]).norm()


@pytest.mark.parametrize("layer_types", [["full_attention"] * 2, ["sliding_attention", "simplicial_attention"]])
def test_a_step_on_packed_rows_takes_the_offsets(monkeypatch, untraced, layer_types):
    """Loss and gradients of a compiled model with documents told by offsets, and by doc_ids to dense masks."""
    from sidlm.data.loader import Batch
    from sidlm.models import SidForCausalLM, preset
    from sidlm.train.train_step import arguments

    torch.manual_seed(0)
    config = preset("nano", num_hidden_layers=2, layer_types=layer_types, sliding_window=40, simplicial_window=[32, 8])
    with torch.device("cuda"):
        model = SidForCausalLM(config).train()
    ids = torch.randint(0, 500, (3, 256))
    docs = torch.tensor([[0] * 90 + [1] * 166, [0] * 256, [0] * 128 + [1] + [2] * 127])
    here = torch.arange(256).expand(3, -1)
    starts = torch.cat((torch.zeros(3, 1, dtype=torch.int64), here[:, 1:] * docs.diff(dim=1)), dim=1).cummax(1).values
    batch = Batch(ids, ids.roll(-1, 1), here - starts, docs)

    def run(offsets, impl):
        monkeypatch.setenv("SID_IMPL", impl)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**arguments(batch, torch.device("cuda"), offsets=offsets), use_cache=False).loss
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
        return found

    own = run(False, "attention=sdpa")
    untraced()
    for block in model.model.layers:
        block.forward = torch.compile(block.forward)
    for mine, other in zip(run(True, ""), own, strict=True):
        assert (mine - other).norm() <= 3e-2 * other.norm()
    torch.compiler.reset()


@pytest.mark.parametrize("tokens", [1, 700, 3000])
@pytest.mark.parametrize("vocab", [1001, 32000])
def test_the_loss_in_bfloat16(tokens, vocab):
    """The compiled softmax and the products that are summed in fp32, against float64: within twice the error of the
    same products with whole logits."""
    make = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, 256, generator=make, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, 256, generator=make, device="cuda") / 16
    labels = torch.randint(-1, vocab, (tokens,), generator=make, device="cuda")

    def run(loss, dtype):
        x, w = hidden.to(dtype).requires_grad_(), weight.bfloat16().to(dtype).requires_grad_()
        value = loss(x, w)
        return [t.double() for t in (value.detach(), *torch.autograd.grad(value, (x, w)))]

    def whole(x, w):
        return torch.nn.functional.cross_entropy(
            (x @ w.T).to(torch.promote_types(x.dtype, torch.float32)), labels, ignore_index=-1, reduction="sum"
        )

    exact, own = run(whole, torch.float64), run(whole, torch.bfloat16)
    mine = run(lambda x, w: linear_cross_entropy(x, w, labels), torch.bfloat16)
    for e, o, m in zip(exact, own, mine, strict=True):
        assert (m - e).norm() <= 2 * (o - e).norm() + 1e-6 * e.norm()

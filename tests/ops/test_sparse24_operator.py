"""The squared-ReLU function as PyTorch sees it: memory, torch.compile, checkpointing, FSDP and the FLOP counter."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sidlm.ops import squared_relu_ffn
from sidlm.ops.sparse24 import autograd, eager
from sidlm.ops.sparse24.flops import backward_flops, forward_flops

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORMS = [{"sparsity": s, "precision": p} for s in (None, "2:4") for p in (None, "fp8")]


def leaves(tokens=18, features=200, d=20, d_out=12, dtype=torch.float32, device="cpu"):
    make = torch.Generator().manual_seed(0) if device == "cpu" else None
    shapes = ((tokens, d), (features, d), (d_out, features))
    return [torch.randn(s, generator=make, device=device).to(dtype).requires_grad_() for s in shapes]


def gradients(function, xs):
    """The value of a function of x, w_up and w_down, and its three gradients."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    loss = function(*xs)
    return loss.detach(), *torch.autograd.grad(loss, xs)


def same(mine, other, **tolerance):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 0, "equal_nan": True})


@pytest.mark.parametrize("enabled", [None, True, False])
@pytest.mark.parametrize(
    ("sparse", "fp8", "reuse_mask"),
    [(False, False, True), (True, False, True), (True, True, True), (True, True, False)],
)
def test_operators(sparse, fp8, reuse_mask, enabled):
    """Forward through autograd, and the backward operator, which has no gradient of its own."""
    xs = leaves(5, 72, dtype=torch.bfloat16 if fp8 else torch.float32)
    switch = None if enabled is None else torch.tensor(enabled)
    form = autograd._form("eager", xs[0].device, xs[0].dtype, sparse, fp8)
    settings = ("eager", form, sparse, fp8, 0.05, True, reuse_mask)
    for keep, measure in ((True, True), (True, False), (False, False)):
        ys = xs if keep else [x.detach() for x in xs]
        # the last one compares results: not of what is NaN, is not written, or is e4m3, which it cannot add up
        checks = OPCHECKS[: 3 if measure or (keep and sparse and (fp8 or enabled is False)) else 4]
        torch.library.opcheck(autograd._ffn, (*ys, switch, torch.zeros(5), keep, measure, *settings), test_utils=checks)
    xs = [x.detach() for x in xs]
    out, _, *kept = autograd._ffn(*xs, switch, None, True, False, *settings)
    args = (torch.ones_like(out), *xs, *kept, switch, *settings)
    checks = OPCHECKS[fp8 and sparse :]  # the first one multiplies its arguments, which e4m3 cannot
    torch.library.opcheck(autograd._ffn_backward, args, test_utils=checks)


def saved_bytes(function, *arguments):
    """Bytes of each different tensor that autograd keeps for the backward pass; the arguments must be among them."""
    found = {}
    with saved_tensors_hooks(lambda t: found.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t):
        out = function(*arguments)
    assert out.requires_grad and all(x.data_ptr() in found for x in arguments)
    return sum(found.values())


@pytest.mark.parametrize("enabled", [None, True, False])
@pytest.mark.parametrize(("precision", "an_element"), [(None, 1.125), ("bf16", 1.125), ("fp8", 0.625)])
def test_what_is_kept_for_the_backward_pass(precision, an_element, enabled):
    """Packed activations, the arguments, and one number for each token and feature."""
    xs = leaves(256, 512, dtype=torch.bfloat16)
    settings = {"sparsity": "2:4", "precision": precision}
    if enabled is not None:
        settings["enabled"] = torch.tensor(enabled)
    kept = saved_bytes(lambda *xs: squared_relu_ffn(*xs, **settings), *xs)
    numbers = 4 * 512 + 4 * 256 * (precision == "fp8") + (enabled is not None)
    assert kept == an_element * 256 * 512 + sum(x.nbytes for x in xs) + numbers


@pytest.mark.parametrize("settings", [{}, {"sparsity": "2:4", "reuse_mask": False}], ids=str)
def test_y1_is_kept_where_it_is_needed(settings):
    xs = leaves(256, 512, dtype=torch.bfloat16)
    kept = saved_bytes(lambda *xs: squared_relu_ffn(*xs, **settings), *xs)
    act = 1.125 * 256 * 512 + 4 * 512 if settings else 0
    assert kept == 2 * 256 * 512 + act + sum(x.nbytes for x in xs)


@pytest.mark.parametrize("settings", [*FORMS, {"sparsity": "2:4", "enabled": torch.tensor(False)}], ids=str)
def test_nothing_is_kept_without_gradients(settings, monkeypatch):
    results = []
    run = autograd.forward
    monkeypatch.setattr(autograd, "forward", lambda *args: results.append(run(*args)) or results[-1])
    xs = leaves(dtype=torch.bfloat16)
    expected = squared_relu_ffn(*xs, **settings)
    with torch.no_grad():
        out = squared_relu_ffn(*xs, **settings)
    frozen = squared_relu_ffn(*(x.detach() for x in xs), **settings)
    with torch.inference_mode():
        inferred = squared_relu_ffn(*xs, **settings)
    assert torch.equal(out, expected) and torch.equal(frozen, expected) and torch.equal(inferred, expected)
    assert not out.requires_grad and not frozen.requires_grad
    (_, kept, _), *others = results
    assert any(x is not None for x in kept) and all(x is None for _, none, _ in others for x in none)


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_zeros_are_made_for_the_gradients_of_what_is_kept():
    xs = leaves(dtype=torch.bfloat16)
    out = squared_relu_ffn(*xs, sparsity="2:4")
    with Called() as called:
        torch.autograd.grad(out, xs, torch.ones_like(out))
    assert "sidlm.squared_relu_ffn_backward.default" in called.names
    assert not [name for name in called.names if "zeros" in name]


def test_weights_need_no_gradients():
    x, w_up, w_down = leaves()
    whole = gradients(lambda *xs: squared_relu_ffn(*xs, sparsity="2:4").square().sum(), (x, w_up, w_down))
    out = squared_relu_ffn(x, w_up.detach(), w_down.detach(), sparsity="2:4")
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], whole[1])


@pytest.fixture
def no_steps(monkeypatch):
    """Shapes may be asked for, but nothing may be computed."""

    def ran(*args):
        pytest.fail("a step ran")

    steps = eager.STEPS
    names = [name for name in steps._fields if callable(getattr(steps, name)) and name not in ("empty_packed", "form")]
    monkeypatch.setattr(eager, "STEPS", steps._replace(**dict.fromkeys(names, ran)))


@pytest.mark.parametrize("settings", [*FORMS, {"sparsity": "2:4", "reuse_mask": False}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_tensors(no_steps, device, settings):
    with FakeTensorMode():
        xs = leaves(100_000, 8192, 2048, 1024, torch.bfloat16, device)  # working on it would take minutes
        x, *weights = xs
        out, stats = squared_relu_ffn(x.view(10, 10_000, -1), *weights, return_stats=True, **settings)
        grads = torch.autograd.grad(out.sum(), xs)
    assert (out.shape, out.dtype, out.device.type) == ((10, 10_000, 1024), torch.bfloat16, device)
    assert (stats.shape, stats.dtype, stats.device.type) == ((5,), torch.float32, device)
    for x, grad in zip(xs, grads, strict=True):
        assert (grad.shape, grad.dtype, grad.device.type) == (x.shape, x.dtype, device) and grad.is_contiguous()


@pytest.mark.parametrize("settings", [*FORMS, {"sparsity": "2:4", "enabled": torch.tensor(False)}], ids=str)
def test_fake_results_are_like_the_real_ones(settings):
    """Shapes, strides and dtypes of all that is kept."""
    kept = []

    def pack(t):
        kept.append((t.shape, t.stride(), t.dtype))
        return t

    for fake in (False, True):
        xs = leaves(18, dtype=torch.bfloat16)
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            xs = [mode.from_tensor(x) for x in xs]
        with saved_tensors_hooks(pack, lambda t: t):
            squared_relu_ffn(*xs, **settings)
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]


@pytest.mark.parametrize("settings", [*FORMS, {"sparsity": "2:4", "enabled": torch.tensor(False)}], ids=str)
def test_flops_are_those_of_the_dense_function(settings):
    xs = leaves()
    with FlopCounterMode(display=False) as counter:
        out = squared_relu_ffn(*xs, **settings)
    assert counter.get_total_flops() == 2 * 18 * 200 * (20 + 12) == forward_flops(18, 20, 200, 12)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 18 * 200 * (20 + 12) == backward_flops(18, 20, 200, 12)


def test_flops_are_those_of_two_linear_layers():
    x, w_up, w_down = leaves()
    with FlopCounterMode(display=False) as counter:
        nn.functional.linear(nn.functional.linear(x, w_up).relu().square(), w_down).sum().backward()
    assert counter.get_total_flops() == forward_flops(18, 20, 200, 12) + backward_flops(18, 20, 200, 12)


def compiler_missing():
    """inductor writes C++ for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler() is None
    except Exception:  # whatever it raises where it finds none
        return True


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_compiles_to_one_graph(unchecked, settings):
    compare_compiled(unchecked, "aot_eager", settings)


@pytest.mark.skipif(compiler_missing(), reason="needs a C++ compiler")
def test_compiles_with_inductor(unchecked):
    compare_compiled(unchecked, "inductor", {"sparsity": "2:4", "precision": "fp8"})


def compare_compiled(unchecked, backend, settings):
    """Forward and gradients, with elementwise operations on both sides to fuse."""
    torch.compiler.reset()
    op = unchecked(squared_relu_ffn)

    def loss(x, *weights):
        return op(x.abs() - 0.5, *weights, **settings).square().sum()

    xs = leaves()
    same(gradients(torch.compile(loss, fullgraph=True, backend=backend), xs), gradients(loss, xs), rtol=1e-5, atol=1e-4)


def test_compiles_under_autocast_and_without_gradients(unchecked):
    torch.compiler.reset()
    op = unchecked(squared_relu_ffn)

    def loss(*xs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(*xs, sparsity="2:4").float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, leaves()), gradients(loss, leaves()))
    with torch.no_grad():
        assert torch.equal(compiled(*leaves()), loss(*leaves()))


def test_a_new_number_of_tokens_does_not_break_the_graph(unchecked):
    torch.compiler.reset()
    op = unchecked(squared_relu_ffn)
    compiled = torch.compile(lambda *xs: op(*xs, sparsity="2:4", precision="fp8").square().sum(),
                             fullgraph=True, backend="aot_eager", dynamic=True)  # fmt: skip
    for tokens in (12, 17, 25):
        xs = leaves(tokens)
        expected = gradients(lambda *xs: squared_relu_ffn(*xs, sparsity="2:4", precision="fp8").square().sum(), xs)
        same(gradients(compiled, xs), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_enabled_is_read_while_it_runs(unchecked, precision, checkpointed):
    """One graph, compiled once, dense or sparse by a tensor that is changed in place; its statistics too."""
    torch.compiler.reset()
    op = unchecked(squared_relu_ffn)
    enabled, stats = torch.tensor(False), torch.zeros(5)

    def loss(*xs):
        def layer(*xs):
            out = op(*xs, sparsity="2:4", precision=precision, enabled=enabled, stats=stats)
            return out + xs[0].sum()

        out = checkpoint(layer, *xs, use_reentrant=False) if checkpointed else layer(*xs)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    # the checkers of shapes, which only tests have, are side effects
    with torch._dynamo.config.patch(error_on_recompile=True, skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        found = []
        for on in (False, True, False, True):
            enabled.fill_(on)
            stats.zero_()
            found.append((*gradients(compiled, leaves()), stats.clone()))
            stats.zero_()
            same(found[-1], (*gradients(loss, leaves()), stats))
            assert stats[4].isfinite() == on and (stats[2:4] > 0).all() == on
    same(found[0], found[2])
    same(found[1], found[3])
    assert (found[0][0] - found[1][0]).abs() > 0.001 * found[0][0]


def test_statistics_of_a_compiled_call(unchecked):
    """Without a tensor to write to, those of the backward pass are not known."""
    torch.compiler.reset()
    op = unchecked(squared_relu_ffn)
    xs = leaves()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    out, stats = compiled(*xs, sparsity="2:4", return_stats=True)
    out.sum().backward()
    expected = op(*xs, sparsity="2:4", return_stats=True)[1]
    assert torch.equal(stats[[0, 1, 4]], expected[[0, 1, 4]]) and stats[2:4].isnan().all()


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_checkpointing_changes_no_bit(precision, impl):
    def block(*xs, stats):
        settings = {"sparsity": "2:4", "precision": precision, "impl": impl, "stats": stats}
        return squared_relu_ffn(*(x.tanh() for x in xs), **settings).sigmoid()

    plain, again = torch.zeros(5), torch.zeros(5)
    expected = gradients(lambda *xs: block(*xs, stats=plain).square().sum(), leaves())

    def checkpointed(*xs):
        return checkpoint(block, *xs, use_reentrant=False, stats=again).square().sum()

    same((*gradients(checkpointed, leaves()), again), (*expected, plain))
    assert again.isfinite().all()


class FeedForward(nn.Module):
    def __init__(self, w_up, w_down):
        super().__init__()
        self.up, self.down = nn.Parameter(w_up.detach().clone()), nn.Parameter(w_down.detach().clone())

    def forward(self, x):
        return squared_relu_ffn(x, self.up, self.down, sparsity="2:4", precision="fp8")


@pytest.fixture
def one_rank():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
def test_weights_of_fsdp(one_rank):
    """Gathered before each pass, freed after it: the gradients are those of the plain layer."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x, w_up, w_down = leaves()
    x = x.detach().view(2, 9, 20).requires_grad_()
    plain, sharded = FeedForward(w_up.bfloat16(), w_down.bfloat16()), FeedForward(w_up, w_down)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    plain(x.bfloat16()).square().sum().backward()
    sharded(x).square().sum().backward()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(q.grad.full_tensor(), p.grad.float())

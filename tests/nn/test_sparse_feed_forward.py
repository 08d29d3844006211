"""The 2:4 sparse form of the squared-ReLU layer: what it computes, its switch, its statistics, its life as a module."""

import copy
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sidlm import ops
from sidlm.nn import SquaredReLUFeedForward
from sidlm.ops.sparse24.select import select_2to4


def layer(sparsity="2:4", width=192, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return SquaredReLUFeedForward(24, width, sparsity=sparsity, **settings).to(dtype)


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, 24, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gradients(module, x, run=None):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = (run or module)(x)
    (out.square().sum() + out.sum()).backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


def test_without_sparsity_it_is_the_dense_layer(monkeypatch):
    monkeypatch.setattr(ops, "squared_relu_ffn", None)
    mlp = layer(None, dtype=torch.float32)
    x = tokens(2, 5, dtype=torch.float32)
    expected = gradients(mlp, x, lambda x: mlp.down_proj(F.relu(mlp.up_proj(x)).square()))
    for a, b in zip(gradients(mlp, x), expected, strict=True):
        assert torch.equal(a, b)


def test_two_of_four_activations_count():
    mlp, x = layer(), tokens(2, 5)
    y = F.linear(x, mlp.up_proj.weight)
    expected = (y.clamp_min(0).square() * select_2to4(y)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(x) - layer(None)(x)).norm() > 0.05 * expected.norm()


def test_switched_off_it_is_dense():
    mlp, x = layer(), tokens(2, 16)
    mlp.enabled.fill_(False)
    for a, b in zip(gradients(mlp, x), gradients(layer(None), x), strict=True):
        torch.testing.assert_close(a, b)
    mlp.enabled.fill_(True)
    on = gradients(mlp, x)
    mlp.enabled.fill_(False)
    assert all((a - b).norm() > 0.02 * b.norm() for a, b in zip(on, gradients(mlp, x), strict=True))


def test_low_precision_without_sparsity():
    x = tokens(2, 16, dtype=torch.bfloat16)
    exact, rounded = (layer(None, dtype=torch.bfloat16, precision=p)(x) for p in (None, "fp8"))
    assert 1e-3 < (exact - rounded).norm() / exact.norm() < 0.1


def test_every_setting_reaches_the_operation(monkeypatch):
    seen = {}
    monkeypatch.setattr(ops, "squared_relu_ffn", lambda x, up, down, **settings: seen.update(settings) or x)
    mlp = layer(precision="fp8", dense_features=0.25, permute_tokens=False, reuse_mask=False)
    mlp(tokens(3))
    assert seen.pop("enabled") is mlp.enabled
    assert seen == {
        "sparsity": "2:4", "precision": "fp8", "dense_features": 0.25, "permute_tokens": False, "reuse_mask": False,
        "stats": None,
    }  # fmt: skip


def test_the_switch_is_no_part_of_the_state():
    mlp = layer()
    assert set(mlp.state_dict()) == {"up_proj.weight", "down_proj.weight"}
    assert not list(mlp.buffers()) and len(list(mlp.parameters())) == 2
    mlp.enabled.fill_(False)
    again = layer()
    again.load_state_dict(mlp.state_dict())
    assert again.enabled.item() is True


def test_the_switch_stays_on_the_cpu():
    with torch.device("meta"):
        mlp = SquaredReLUFeedForward(24, 192, sparsity="2:4")
    assert mlp.up_proj.weight.is_meta
    for moved in (mlp, mlp.half(), mlp.to_empty(device="cpu"), mlp.to("meta"), mlp.bfloat16()):
        assert (moved.enabled.device.type, moved.enabled.dtype) == ("cpu", torch.bool)
        assert moved.enabled.item() is True


def test_copies_and_pickles():
    mlp, x = layer(), tokens(2, 16)
    mlp.measure()
    mlp(x).sum().backward()  # statistics of a pass do not stand in the way
    mlp.enabled.fill_(False)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    for again in (copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        assert again.enabled.item() is False and again.enabled is not mlp.enabled
        again.enabled.fill_(True)
        assert mlp.enabled.item() is False
        mlp.enabled.fill_(True)
        assert torch.equal(again(x), mlp(x))
        mlp.enabled.fill_(False)


def test_statistics_only_when_asked_for():
    mlp, x = layer(), tokens(3, 16)
    gradients(mlp, x)
    assert mlp.statistics is None
    plain = gradients(mlp, x)
    mlp.measure()
    assert mlp.statistics.isnan().all()
    for a, b in zip(gradients(mlp, x), plain, strict=True):
        assert torch.equal(a, b)
    y = F.linear(x, mlp.up_proj.weight)
    alive, kept = (y > 0).sum(), ((y > 0) & select_2to4(y)).sum()
    assert mlp.statistics.shape == (5,) and mlp.statistics.dtype == torch.float32
    expected = torch.stack([1 - alive / y.numel(), 1 - kept / alive])
    torch.testing.assert_close(mlp.statistics[:2].double(), expected.double(), rtol=1e-5, atol=0)
    assert (mlp.statistics[2:] > 0).all() and (mlp.statistics < 1).all()
    mlp.measure(False)
    gradients(mlp, x)
    assert mlp.statistics is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    mlp, x = layer(), tokens(3, 16)
    mlp.measure()
    plain = gradients(mlp, x)
    statistics = mlp.statistics.clone()
    assert statistics.isfinite().all()
    mlp.measure()
    again = gradients(mlp, x, lambda x: checkpoint(mlp, x, use_reentrant=reentrant))
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mlp.statistics, statistics)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_a_layer_that_is_more_than_its_weight_is_refused(name):
    """An adapter, say: it would be passed over silently."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    mlp = layer()
    old = getattr(mlp, name)
    setattr(mlp, name, Adapter(old.in_features, old.out_features, bias=False).double())
    with pytest.raises(ValueError, match=f"{name} is a Adapter: "):
        mlp(tokens(2))
    setattr(mlp, name, torch.nn.Linear(old.in_features, old.out_features).double())
    with pytest.raises(ValueError, match=f"{name} is a Linear with a bias: "):
        mlp(tokens(2))
    mlp.sparsity = None
    mlp(tokens(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "1:4"}, "mlp_sparsity must be one of .*'1:4'"),
        ({"sparsity": "2:4", "precision": "fp16"}, "mlp_precision must be one of .*'fp16'"),
        ({"sparsity": "2:4", "dense_features": 1.5}, "mlp_dense_features is a share .*got 1.5"),
        ({"sparsity": "2:4", "width": 100}, "intermediate_size must be a multiple of 8 for 2:4 sparsity, got 100"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)


def test_spread_over_two_processes(tmp_path):
    """FSDP2 gathers the weights and DDP copies them; both average the gradients of the ranks' own tokens."""
    program = Path(__file__).with_name("sharded_feed_forward.py")
    ranks = [subprocess.Popen([sys.executable, program, str(rank), "2", tmp_path]) for rank in range(2)]
    spec = importlib.util.spec_from_file_location("sharded_feed_forward", program)
    assert spec is not None and spec.loader is not None
    sharded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sharded)
    whole = sharded.layer()
    (sum(sharded.loss_of(whole, rank, 2) for rank in range(2)) / 2).backward()
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for name in ("fsdp", "ddp"):
        grads = torch.load(tmp_path / f"{name}.pt")
        for parameter, x in whole.named_parameters():
            assert (grads.pop(parameter) - x.grad).norm() <= 1e-12 * x.grad.norm(), (name, parameter)
        assert not grads

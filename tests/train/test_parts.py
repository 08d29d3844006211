"""Schedule, optimizer, hardware, metrics."""

import json
import math

import pytest
import torch
from torch import nn

from sidlm.errors import SidError
from sidlm.train import hardware
from sidlm.train.config import OptimConfig
from sidlm.train.metrics import JsonLines, read_json_lines
from sidlm.train.optim import clip_gradients, make_optimizer, optimizer_tensors, set_learning_rate
from sidlm.train.schedule import ScheduleConfig, learning_rate, warmup_steps


def test_schedule_values():
    cfg = ScheduleConfig(warmup_steps=4, floor=0.1)
    lrs = [learning_rate(s, cfg, peak=2.0, total_steps=15) for s in range(15)]
    assert lrs[:4] == [0.5, 1.0, 1.5, 2.0]
    assert lrs[4] == 2.0
    assert lrs[9] == pytest.approx((2.0 + 0.2) / 2)  # half way down the cosine
    assert lrs[14] == pytest.approx(0.2)
    assert lrs[4:] == sorted(lrs[4:], reverse=True)


def test_schedule_defaults():
    assert warmup_steps(ScheduleConfig(), 1000) == 20
    assert warmup_steps(ScheduleConfig(), 3) == 1
    assert learning_rate(0, ScheduleConfig(), peak=1.0, total_steps=1) == 1.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)


def test_decay_is_on_matrices_only():
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.embed.weight, before["embed.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.norm.weight, before["norm.weight"])


def test_state_made_at_once_is_what_torch_makes():
    """The first step from the prepared state equals that of a plain AdamW."""
    torch.manual_seed(3)
    model, other = Small(), Small()
    other.load_state_dict(model.state_dict())
    cfg = OptimConfig(lr=0.1)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    plain.param_groups[0]["params"] = [other.embed.weight]
    optimizer = make_optimizer(model, cfg)
    for step in range(3):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model.embed.weight.grad, other.embed.weight.grad = grad.clone(), grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(model.embed.weight, other.embed.weight)
    assert set(optimizer_tensors(model, optimizer)) == {
        f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_down_projections_and_the_embedding_have_learning_rates_of_their_own():
    block = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("up_proj", "down_proj")})
    model = nn.ModuleDict({"mlp": block, "embed_tokens": nn.Embedding(3, 3)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(
        model, OptimConfig(lr=1.0, weight_decay=0.0, down_proj_lr_scale=0.25, embedding_lr_scale=4.0)
    )
    set_learning_rate(optimizer, 0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step of Adam is the learning rate
    for name, step in (("mlp.up_proj.weight", 0.5), ("mlp.down_proj.weight", 0.125), ("embed_tokens.weight", 2.0)):
        torch.testing.assert_close(before[name] - model.get_parameter(name), torch.full((3, 3), step))


def test_clipping():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 0.0).item() == 5.0
    assert b.grad.item() == 4.0
    assert clip_gradients([a, b], 1.0).item() == 5.0
    assert math.hypot(a.grad.norm().item(), b.grad.item()) == pytest.approx(1.0, rel=1e-5)


def test_unusable_device():
    with pytest.raises(SidError, match=r"train\.device='teapot'"):
        hardware.resolve_device("teapot")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165),
     ("AMD Instinct MI300X", 1307), ("NVIDIA RTX A4000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)],
)  # fmt: skip
def test_peak_by_name(name, teraflops):
    assert hardware.data_sheet_flops(name) == (teraflops and teraflops * 1e12)


def test_matmul_probe_and_memory():
    assert 1e8 < hardware.measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.0) < 1e15
    assert 1e7 < hardware.peak_memory_bytes(torch.device("cpu")) < 1e13


def test_git_revision(tmp_path):
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    assert hardware.git_revision(tmp_path / "a") is None
    (tmp_path / ".git/packed-refs").write_text("# pack\nabc123 refs/heads/main\n")
    assert hardware.git_revision(tmp_path / "a") == "abc123"
    (tmp_path / ".git/refs/heads/main").write_text("def456\n")
    assert hardware.git_revision(tmp_path / "a") == "def456"


def test_lines_past_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    lines = JsonLines(path, 3)
    lines.write({"step": 4, "text": "ü"})
    lines.close()
    assert [r["step"] for r in read_json_lines(path)] == [1, 2, 3, 4]


def test_an_unreadable_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2"):
        assert [r["step"] for r in read_json_lines(path)] == [1, 2]

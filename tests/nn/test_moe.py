import pytest
import torch
import torch.nn.functional as F

from sidlm.nn import MoEFeedForward, moe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(num_experts: int = 5, top_k: int = 2, seed: int = 0, **kwargs) -> MoEFeedForward:
    torch.manual_seed(seed)
    made = MoEFeedForward(16, 24, num_experts, top_k, **kwargs)
    made.reset_parameters(std=0.3)
    return made


def oracle(mlp: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """One token at a time, one expert at a time."""
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        logits = mlp.router.weight @ token
        gates = logits.softmax(0) if mlp.gate == "softmax" else logits.sigmoid()
        chosen = (gates + mlp.balance_bias).topk(mlp.top_k).indices
        for e in chosen:
            up = mlp.up_proj[e] @ token
            hidden = F.relu(up) ** 2 if mlp.gate_proj is None else F.silu(mlp.gate_proj[e] @ token) * up
            out[n] += gates[e] / gates[chosen].sum() * (mlp.down_proj[e] @ hidden)
    return out if mlp.shared_expert is None else out + mlp.shared_expert(x)


@pytest.mark.parametrize("kind", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_is_its_definition(kind, gate, shared, top_k):
    mlp = layer(top_k=top_k, kind=kind, gate=gate, shared_experts=shared).double()
    mlp.balance_bias.uniform_(-0.2, 0.2)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), oracle(mlp, x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_grouped_gemm_and_loop_agree(device, dtype, tokens, monkeypatch):
    if not moe.grouped_mm_works(device, dtype):
        pytest.skip(f"this torch has no grouped GEMM for {dtype} on {device}")
    mlp, x = layer().to(device, dtype), torch.randn(tokens, 16, device=device, dtype=dtype)
    exact = layer().to(device).double()(x.double())
    results = {}
    for name, works in (("grouped", True), ("loop", False)):
        monkeypatch.setattr(moe, "grouped_mm_works", lambda *_, works=works: works)
        mlp.zero_grad()
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        # sum() hands the backward a gradient of stride zero
        out.sum().backward()
        results[name] = [out.detach(), leaf.grad, *(p.grad for p in mlp.parameters())]
    error = (results["loop"][0].double() - exact).abs().max().item()
    atol = 3 * error + torch.finfo(dtype).eps
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=atol)


def test_the_cpu_has_a_grouped_gemm_in_some_dtype_or_the_test_above_is_empty():
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped GEMM on a CPU")
    assert moe.grouped_mm_works("cpu", torch.float32)


def test_sizes_that_grouped_gemm_refuses_run():
    torch.manual_seed(0)
    mlp = MoEFeedForward(6, 10, 3, 2)
    mlp.reset_parameters(std=0.3)
    x = torch.randn(5, 6)
    torch.testing.assert_close(mlp(x), oracle(mlp, x))


def test_a_token_does_not_depend_on_its_batch():
    mlp, x = layer().double(), torch.randn(40, 16, dtype=torch.float64)
    together = mlp(x)
    for n, part in ((0, x[:1]), (3, x[3:20]), (5, x[[5]].expand(30, -1))):
        torch.testing.assert_close(mlp(part)[0], together[n], rtol=0, atol=1e-14)


def test_nothing_is_dropped_when_all_tokens_choose_one_expert():
    mlp = layer(top_k=1)
    mlp.balance_bias[3] = 10.0
    x = torch.randn(50, 16)
    assert mlp.route(x)[1].unique().tolist() == [3]
    torch.testing.assert_close(mlp(x), oracle(mlp, x))


def test_bias_chooses_but_does_not_weigh():
    mlp, x = layer(top_k=2, gate="sigmoid"), torch.randn(30, 16)
    weights, experts = mlp.route(x)
    mlp.balance_bias += 5.0
    same_weights, same_experts = mlp.route(x)
    assert torch.equal(weights, same_weights) and torch.equal(experts, same_experts)
    mlp.balance_bias[1] += 5.0
    weights, experts = mlp.route(x)
    scores = F.linear(x, mlp.router.weight).sigmoid().gather(1, experts)
    assert (experts == 1).any(dim=1).all()
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


def test_update_balance():
    mlp = layer(num_experts=4, top_k=1)
    mlp.expert_counts.copy_(torch.tensor([10, 0, 5, 5]))
    mlp.update_balance(0.1)
    torch.testing.assert_close(mlp.balance_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    assert mlp.expert_counts.tolist() == [0, 0, 0, 0]
    mlp.update_balance(0.1)
    torch.testing.assert_close(mlp.balance_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_balance_evens_the_load(gate):
    mlp = layer(num_experts=6, top_k=2, gate=gate).train()
    x = torch.randn(512, 16) + torch.randn(16)
    with torch.no_grad():
        mlp(x)
        first = mlp.expert_counts.max() / mlp.expert_counts.float().mean()
        for _ in range(500):
            mlp.update_balance(2e-3)
            mlp(x)
    last = mlp.expert_counts.max() / mlp.expert_counts.float().mean()
    assert first > 1.8 and last < 1.2, (first, last)


def test_only_training_counts():
    mlp, x = layer(), torch.randn(10, 16)
    mlp.eval()(x)
    assert mlp.expert_counts.sum() == 0
    mlp.train()(x)
    mlp(x)
    assert mlp.expert_counts.sum() == 2 * 10 * 2
    assert "expert_counts" not in mlp.state_dict() and "balance_bias" in mlp.state_dict()


def test_autocast_keeps_the_routing():
    mlp, x = layer(), torch.randn(200, 16)
    weights, experts = mlp.route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_weights, low_experts = mlp.route(x)
        out = mlp(x)
    assert torch.equal(experts, low_experts) and torch.equal(weights, low_weights)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, mlp(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 6}, r"num_experts_per_tok must be in 1\.\.5 \(num_local_experts\), got 6"),
        ({"gate": "relu"}, "moe_gate must be one of .*'relu'"),
        ({"kind": "gelu"}, "mlp_type must be one of .*'gelu'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)

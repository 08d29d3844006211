import torch

from sidlm.nn import SquaredReLUFeedForward, SwiGLUFeedForward


def test_swiglu():
    torch.manual_seed(0)
    mlp, x = SwiGLUFeedForward(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
    assert set(mlp.state_dict()) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def test_squared_relu():
    torch.manual_seed(0)
    mlp, x = SquaredReLUFeedForward(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    expected = (x @ mlp.up_proj.weight.T).clamp_min(0).pow(2) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
    assert set(mlp.state_dict()) == {"up_proj.weight", "down_proj.weight"}

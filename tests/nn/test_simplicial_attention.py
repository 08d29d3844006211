import pytest
import torch

from sidlm import ops
from sidlm.nn import Attention, Rotary, SimplicialAttention

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def positions(length: int, start: int = 0, head_dim: int = 12, batch: int = 2):
    return Rotary(head_dim, ROPE, three_chunks=True)(torch.arange(start, start + length)[None], batch)


def layer(**kwargs) -> SimplicialAttention:
    torch.manual_seed(0)
    made = SimplicialAttention(20, 4, 2, 12, **({"window": (5, 3)} | kwargs)).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.uniform_(0.5, 2) if "norm" in name else p.normal_(std=0.5)
    return made


def inputs(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("position", ["none", "rope", "rotation"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_is_the_op_on_its_projections(form, position, qk_norm):
    if position == "rotation" and form == "trilinear":
        pytest.skip("refused, see below")
    made = layer(
        form=form, position=position, qk_norm=qk_norm, k2_bias=0.0 if position == "rotation" else 0.3, v2_bias=0.7,
        scale=0.2 if qk_norm else None,
    )  # fmt: skip
    x, pos = inputs(), positions(9)
    docs = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7])
    names = ("q", "k", "v", "k2", "v2")
    z = {n: (x @ getattr(made, f"{n}_proj").weight.T).view(2, 9, -1, 12) for n in names}
    for n in ("q", "k", "k2"):
        if qk_norm:
            z[n] = rms(z[n], getattr(made, f"{n}_norm").weight)
        if position == "rope":
            z[n] = ops.apply_rope(z[n], pos.cos, pos.sin)
        elif position == "rotation":
            z[n] = ops.apply_rope3(z[n], pos.cos3, pos.sin3)
    out = ops.two_simplicial_attention(
        *(z[n] for n in names), window=(5, 3), form=form, k2_bias=made.k2_bias, v2_bias=0.7, doc_ids=docs,
        scale=0.2 if qk_norm else None, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(made(x, pos, doc_ids=docs), out.flatten(2) @ made.o_proj.weight.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("form", "position", "relative"),
    [
        ("determinant", "rotation", True),
        ("determinant", "rope", False),
        ("trilinear", "rope", False),
        ("trilinear", "none", True),
    ],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_which_treatments_leave_relative_positions_only(form, position, relative, qk_norm):
    made = layer(form=form, position=position, qk_norm=qk_norm, v2_bias=1.0)
    x = inputs()
    moved = (made(x, positions(9)) - made(x, positions(9, start=57))).abs().max().item()
    # the tables are float32, so a shift moves an invariant layer by their rounding
    assert moved < 1e-4 if relative else moved > 1e-2


def test_rotation_does_use_positions():
    made = layer(form="determinant", position="rotation")
    x = inputs()
    stretched = Rotary(12, ROPE, three_chunks=True)(torch.arange(0, 18, 2)[None], 2)
    assert (made(x, positions(9)) - made(x, stretched)).abs().max() > 1e-2


def test_with_unit_biases_and_no_second_keys_it_is_sliding_attention():
    made = layer(k2_bias=1.0, v2_bias=1.0)
    with torch.no_grad():
        made.k2_proj.weight.zero_()
        made.v2_proj.weight.zero_()
    plain = Attention(20, 4, 2, 12, window=5).double()
    plain.load_state_dict({name: p for name, p in made.state_dict().items() if "2" not in name})
    x, pos = inputs(), positions(9)
    torch.testing.assert_close(made(x, pos), plain(x, pos), rtol=0, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_learns(qk_norm):
    made = layer(qk_norm=qk_norm, k2_bias=1.0, v2_bias=1.0)
    made(inputs(), positions(9)).square().sum().backward()
    assert len(list(made.parameters())) == 6 + 3 * qk_norm
    for name, p in made.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_refusals():
    with pytest.raises(ValueError, match=r"simplicial_position must be one of .*'alibi'"):
        layer(position="alibi")
    with pytest.raises(ValueError, match="'rotation' needs simplicial_form 'determinant', got 'trilinear'"):
        layer(position="rotation")
    with pytest.raises(ValueError, match="'rotation' needs simplicial_k2_bias 0, got 1"):
        layer(position="rotation", form="determinant", k2_bias=1.0)

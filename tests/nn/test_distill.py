"""Squared-ReLU layers fitted to SwiGLU ones."""

import pytest
import torch
import torch.nn.functional as F

from sidlm.nn.distill import SwiGLUWeights, fit_squared_relu, paired, relative_error, squared_relu


def layer(features: int = 24, dim: int = 16, seed: int = 0) -> SwiGLUWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[1] ** 0.5

    return SwiGLUWeights(random(features, dim), random(features, dim), random(dim, features))


def swiglu(x: torch.Tensor, weights: SwiGLUWeights) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, weights.gate)) * F.linear(x, weights.up), weights.down)


def inputs(count: int = 800) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(9))


def test_pairs_are_a_gate_where_the_gate_is_the_larger():
    """For |u| <= |g| the pair is relu(g) u, exactly."""
    gate, up = (
        torch.tensor([[2.0, 0, 0], [-3.0, 0, 0], [0, 4.0, 1.0]]),
        torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, -1]]),
    )
    former = SwiGLUWeights(gate, up, torch.eye(3))
    x = torch.eye(3)[:2]
    y = squared_relu(x, paired(former, x, 6))
    torch.testing.assert_close(y, F.relu(x @ gate.T) * (x @ up.T))


def test_the_most_useful_features_get_the_room():
    weights = layer()
    weights.down[:, 5] *= 100
    start = paired(weights, inputs(), 2)
    gate, up = weights.gate[5], weights.up[5]
    torch.testing.assert_close(start.up, torch.stack((gate + up, gate - up)))


def test_the_fit_is_measured_on_inputs_it_has_not_seen():
    former, x = layer(), inputs()
    fitted, report = fit_squared_relu(former, x, width=36, steps=300)
    assert fitted.up.shape == (36, 16) and fitted.down.shape == (16, 36) and not fitted.up.requires_grad
    held_out = x[-80:]
    assert relative_error(squared_relu(held_out, fitted), swiglu(held_out, former)) == pytest.approx(report.end)
    assert relative_error(squared_relu(held_out, paired(former, x[:-80], 36)), swiglu(held_out, former)) == report.start
    assert report.end < 0.75 * report.start
    again, _ = fit_squared_relu(former, x, width=36, steps=300)
    assert torch.equal(again.up, fitted.up)


def test_a_wider_layer_is_closer_and_no_step_is_the_start():
    former, x = layer(), inputs()
    narrow, wide = (fit_squared_relu(former, x, width=width, steps=150)[1].end for width in (24, 48))
    assert wide < narrow
    fitted, report = fit_squared_relu(former, x, width=48, steps=0)
    assert report.start == report.end and torch.equal(fitted.up, paired(former, x[:-80], 48).up)


def test_a_fit_that_diverges_keeps_the_start():
    former, x = layer(), inputs()
    fitted, report = fit_squared_relu(former, x, width=24, steps=60, lr=1e4)
    assert report.end == report.start and torch.equal(fitted.down, paired(former, x[:-80], 24).down)


@pytest.mark.parametrize(("width", "count", "message"), [
    (7, 50, "width must be even and between 2 and 48, got 7"),
    (50, 50, "width must be even and between 2 and 48, got 50"),
    (8, 5, "5 inputs are too few"),
])  # fmt: skip
def test_what_cannot_be_fitted(width, count, message):
    with pytest.raises(ValueError, match=message):
        fit_squared_relu(layer(), inputs(count), width=width, steps=1)

"""Inputs of the squared-ReLU function, what comes of them, and comparisons, for its tests."""

import torch

from sidlm.ops import squared_relu_ffn

IMPLS = ["eager", "reference"]

NAMES = ("out", "dx", "dw_up", "dw_down")


def inputs(tokens=63, features=200, d=20, d_out=12, dtype=torch.float64, seed=0):
    """x, w_up, w_down and the gradient of the output. Features differ in how often they are active."""
    make = torch.Generator().manual_seed(seed)
    shapes = ((tokens, d), (features, d), (d_out, features), (tokens, d_out))
    x, w_up, w_down, g = (torch.randn(s, generator=make, dtype=torch.float64) for s in shapes)
    x[:, 0] = 1
    w_up[:, 0] = torch.linspace(-4, 4, features, dtype=torch.float64)
    return [t.to(dtype) for t in (x, w_up, w_down, g)]


def run(tensors, **settings):
    """out and the gradients of x, w_up and w_down."""
    *leaves, g = [t.detach().clone() for t in tensors]
    out = squared_relu_ffn(*(t.requires_grad_() for t in leaves), **settings)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def differentiated(function, tensors):
    """The same of any function of the three."""
    *leaves, g = [t.detach().clone() for t in tensors]
    out = function(*(t.requires_grad_() for t in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def same(mine, other, names=NAMES, **tolerance):
    for name, a, b in zip(names, mine, other, strict=True):
        torch.testing.assert_close(
            a, b, **{"rtol": 0, "atol": 0, "equal_nan": True, **tolerance}, msg=lambda m, name=name: f"{name}: {m}"
        )


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def selected_by_hand(left, dense, perm, key):
    """left (T, F) with two non-zeros in every four tokens of perm, found with loops; not for the dense features."""
    kept = left.clone()
    for f in set(range(left.shape[1])) - set(dense):
        for at in range(0, len(perm), 4):
            group = perm[at : at + 4]
            best = sorted(range(len(group)), key=lambda i: (-key(left[group[i], f].item()), i))[:2]
            for i in set(range(len(group))) - set(best):
                kept[group[i], f] = 0
    return kept

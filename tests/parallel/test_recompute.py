"""What blocks compute again: the same numbers, bit for bit, and less that is kept."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import RECOMPUTE
from sidlm.parallel.recompute import recompute_block

MODELS = {
    "llama": {"layer_types": ["full_attention"] * 2},
    "sid": {"layer_types": ["simplicial_attention", "sliding_attention"], "mlp_type": "squared_relu"},
    "sparse": {"layer_types": ["full_attention"] * 2, "mlp_type": "squared_relu", "mlp_sparsity": "2:4"},
    "experts": {"layer_types": ["full_attention"] * 2, "num_local_experts": 4},
}


def step(name: str, how: str, compiled: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    """(loss and gradients, bytes that autograd's hooks see it keep)"""
    torch.manual_seed(0)
    model = SidForCausalLM(
        SidConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            simplicial_window=[6, 3],
            sliding_window=5,
            **MODELS[name],
        )
    )
    for block in model.model.layers:
        recompute_block(block, how, compiled=compiled)
    held: dict[int, int] = {}
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(61, (2, 65), generator=torch.Generator().manual_seed(1))
    with saved_tensors_hooks(pack, lambda x: x):
        loss = model.train()(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss
    loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found, sum(held.values())


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_bit(name):
    expected, kept = step(name, "none")
    for how in RECOMPUTE[1:]:
        found, less = step(name, how)
        assert found.keys() == expected.keys() and less < kept
        assert all(torch.equal(found[key], x) for key, x in expected.items()), how


def test_cheap_recomputation_of_compiled_blocks(monkeypatch):
    """Without the compiler's code generator, which would take most of a test's time."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager_decomp_partition"))
    expected, _ = step("sid", "none")
    found, _ = step("sid", "cheap", compiled=True)
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-6)

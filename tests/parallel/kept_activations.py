"""What compiled blocks keep for their backward pass, and what plans say: printed as JSON for test_plan_measured.py."""

import json
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.layout import Job, Layout
from sidlm.parallel.memory import block_activations
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.recompute import recompute_block
from sidlm.parallel.tensor import apply_tensor_parallel

ROWS, LENGTH = 2, 128
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"layer_types": ["full_attention"]},
    "simplicial": {"layer_types": ["simplicial_attention"], "mlp_type": "squared_relu"},
    "sparse": {"layer_types": ["full_attention"], "mlp_type": "squared_relu", "mlp_sparsity": "2:4"},
    "experts": {"layer_types": ["full_attention"], "num_local_experts": 4},
}
CASES = [
    ("llama", 1, "none"), ("llama", 2, "none"), ("llama", 2, "cheap"),
    ("simplicial", 1, "none"), ("simplicial", 2, "cheap"), ("sparse", 1, "none"),
    ("experts", 1, "none"),
]  # fmt: skip


def config_of(name: str) -> SidConfig:
    return SidConfig(
        vocab_size=131, hidden_size=256, intermediate_size=704, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, simplicial_window=[12, 5], sliding_window=9, **MODELS[name],
    )  # fmt: skip


def kept(config: SidConfig, tp: int, how: str) -> int:
    """Bytes of a block in bf16, other than weights and tables of positions."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = SidForCausalLM(config).to(torch.bfloat16)
    if tp > 1:
        apply_tensor_parallel(model, build_mesh(ParallelConfig(tp=tp), "cpu")["tp"])
    block = model.model.layers[0]
    recompute_block(block, how, compiled=True)
    positions = model.model.rotary(torch.arange(LENGTH)[None], ROWS)
    own = {local(x).untyped_storage().data_ptr() for x in (*model.parameters(), *positions) if x is not None}
    found: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = local(x).untyped_storage()
        alive.append(x)
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    x = torch.randn(ROWS, LENGTH // tp, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        block(x, positions)
    return sum(found.values())


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def main() -> None:
    compiler = torch.compile
    # the partitioner decides what is kept; the code generator would take most of a test's time
    torch.compile = lambda f: compiler(f, backend="aot_eager_decomp_partition")  # type: ignore[assignment]
    results = {}
    with fake_processes(2):
        for name, tp, how in CASES:
            config, layout = config_of(name), Layout(tp=tp, dp=2 // tp, micro_batch=ROWS, recompute=how)
            job = Job(config=config, seq_len=LENGTH, batch=2 * ROWS)
            planned = block_activations(job, layout, MODELS[name]["layer_types"][0], how)
            results[f"{name} tp{tp} {how}"] = kept(config, tp, how), sum(planned.values())
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""The mesh and what plans refuse, under torch's fake process group: one process plans for many."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sidlm.errors import SidError
from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import DIMENSIONS, ParallelConfig
from sidlm.parallel.loss import vocab_parallel_cross_entropy
from sidlm.parallel.mesh import batch_share, build_mesh, fsdp_mesh
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.parallel.tensor import apply_tensor_parallel, check_sizes


@contextmanager
def world(size: int, rank: int = 0) -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def model_of(device: str = "meta", **changes) -> SidForCausalLM:
    config = {
        "vocab_size": 131, "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": ["full_attention", "simplicial_attention"],
    }  # fmt: skip
    with torch.device(device):
        return SidForCausalLM(SidConfig(**(config | changes)))


def test_the_405b_mesh_of_16384_processes():
    with world(16384, rank=16383 - 8):
        mesh = build_mesh(ParallelConfig(tp=8, pp=16, cp=16), "cpu")
        assert mesh.mesh_dim_names == DIMENSIONS and tuple(mesh.shape) == (1, 8, 16, 16, 8)
        assert mesh["tp"].mesh.tolist() == list(range(16368, 16376))  # neighbours
        assert mesh["cp"].mesh.diff().unique().tolist() == [8]
        assert batch_share(mesh) == (7, 8)
        assert fsdp_mesh(mesh).size() == 8 * 16  # dp_shard and cp


def test_replicas_read_other_rows_and_lie_outside_the_shards():
    with world(16, rank=9):
        mesh = build_mesh(ParallelConfig(dp_replicate=2, cp=2, tp=2), "cpu")
        assert tuple(mesh.shape) == (2, 2, 1, 2, 2)
        assert batch_share(mesh) == (2, 4)
        both = fsdp_mesh(mesh)
        assert tuple(both.shape) == (2, 4) and both.mesh.tolist() == [[1, 3, 5, 7], [9, 11, 13, 15]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 3}, "dp_replicate 1 x pp 1 x cp 1 x tp 3 = 3, which does not divide the 16 processes"),
        (
            {"dp_shard": 4, "tp": 2},
            "dp_replicate 1 x dp_shard 4 x pp 1 x cp 1 x tp 2 = 8, but there are 16 processes",
        ),
        ({"cp": 0}, "parallel.cp must be at least 1, got 0"),
        ({"dp_shard": 0}, "parallel.dp_shard must be at least 1, or -1 for what is left, got 0"),
    ],
)
def test_sizes_that_make_no_mesh(settings, message):
    with pytest.raises(SidError, match=message):
        ParallelConfig(**settings).sizes(16)


def test_no_processes_and_an_unknown_device():
    with pytest.raises(SidError, match="device type must be one of cpu, cuda, got 'tpu'"):
        build_mesh(ParallelConfig(), "tpu")
    with pytest.raises(SidError, match="no process group: start the processes with torchrun"):
        build_mesh(ParallelConfig(), "cpu")
    with pytest.raises(SidError, match="precision must be one of fp32, bf16, got 'fp8'"):
        ShardConfig(precision="fp8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            r"num_attention_heads \(6\) does not divide by tp \(4\)",
        ),
        ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\) does not divide by tp \(4\)"),
        ({"intermediate_size": 66}, r"intermediate_size \(66\) does not divide by tp \(4\)"),
        (
            {"intermediate_size": 48, "mlp_type": "squared_relu", "mlp_sparsity": "2:4"},
            r"intermediate_size \(48\) does not divide by tp \(4\) in multiples of 8 features, which 2:4 sparsity",
        ),
        ({"num_local_experts": 4, "num_experts_per_tok": 2}, "tensor parallelism of experts.*num_local_experts is 4"),
    ],
)
def test_sizes_that_tensor_parallelism_cannot_split(changes, message):
    with pytest.raises(SidError, match=message):
        check_sizes(model_of(**changes).config, 4)


def test_a_plan_keeps_names_and_shapes_and_spreads_every_parameter():
    with world(8):
        model = model_of()
        before = {name: p.shape for name, p in model.named_parameters()}
        parallelize(model, build_mesh(ParallelConfig(dp_replicate=2, tp=2), "cpu"), ShardConfig())
        assert {name: p.shape for name, p in model.named_parameters()} == before
        assert list(model.state_dict()) == list(before)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), name
            parts = 2 if name.endswith("norm.weight") else 4  # a norm is whole on both processes of tp
            assert 0 < p.to_local().numel() <= -(-p.shape[0] // parts) * (p.numel() // p.shape[0]), name


def test_calls_of_which_nothing_can_be_split():
    with world(2):
        mesh = build_mesh(ParallelConfig(tp=2), "cpu")["tp"]
        model = model_of()
        apply_tensor_parallel(model, mesh)
        with pytest.raises(ValueError, match=r"sequence length \(7\) does not divide by tp \(2\)"):
            model(input_ids=torch.zeros(1, 7, dtype=torch.int64, device="meta"))
        with pytest.raises(ValueError, match="takes input_ids"):
            model(inputs_embeds=torch.zeros(1, 8, 24, device="meta"))
        with pytest.raises(ValueError, match=r"weight must be a DTensor split by rows .*got a Tensor"):
            vocab_parallel_cross_entropy(torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, dtype=torch.int64))


def test_a_sequence_is_cut_before_it_is_split():
    with world(4):
        model = model_of("cpu")
        parallelize(model, build_mesh(ParallelConfig(cp=2, tp=2), "cpu"), ShardConfig())
        ids = torch.zeros(1, 12, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"sequence length \(3\) does not divide by tp \(2\)"):
            model(input_ids=ids)  # 12 positions in 4 chunks
        with pytest.raises(ValueError, match="takes the model's arguments by name"):
            model(ids)
        with pytest.raises(ValueError, match="cannot cut attention_mask"):
            model(input_ids=ids, attention_mask=ids)

"""Shards of every process of a mesh, made one after the other in torch's fake process group, against one process."""

import itertools

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.models.convert.source import SafetensorsCheckpoint
from sidlm.models.initial import distributions
from sidlm.parallel import materialize
from sidlm.parallel.config import ParallelConfig, PipelineConfig
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.shard import ShardConfig, parallelize

DENSE = {"layer_types": ["full_attention", "simplicial_attention"] * 2, "mlp_type": "squared_relu"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 24}
MESHES = {
    "fsdp 4": (DENSE, {}, {}),
    "tp 2 x fsdp 2, tied": (DENSE | {"tie_word_embeddings": True}, {"tp": 2}, {}),
    "tp 2 x cp 2": (DENSE, {"tp": 2, "cp": 2}, {}),
    "hsdp 2 x 2": (DENSE, {"dp_replicate": 2}, {}),
    "pp 2 x fsdp 2, interleaved, tied": (
        DENSE | {"tie_word_embeddings": True}, {"pp": 2}, {"pipeline": PipelineConfig(virtual_stages=2)},
    ),
    "ep 2 x fsdp 2": (EXPERTS, {}, {"ep": 2}),
    "ep 2 x pp 2": (EXPERTS, {"pp": 2}, {"ep": 2}),
}  # fmt: skip
RANKS = 4


def config_of(changes) -> SidConfig:
    sizes = {
        "vocab_size": 131, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 4,
    }  # fmt: skip
    return SidConfig(**(sizes | changes))


def on_meta(config: SidConfig) -> SidForCausalLM:
    with torch.device("meta"):
        return SidForCausalLM(config)


def shards(changes, sizes, settings, fill):
    """(name, part, index of its first element) of all processes."""
    for rank in range(RANKS):
        with fake_processes(RANKS, rank):
            model = on_meta(config_of(changes))
            found = distributions(model, model.config)
            pipeline = parallelize(model, build_mesh(ParallelConfig(**sizes), "cpu"), ShardConfig(**settings))
            materialize.allocate([model] if pipeline is None else pipeline.stages, torch.device("cpu"))
            assert not any(buffer.any() for buffer in model.buffers())
            if "tie_word_embeddings" in changes and (pipeline is None or pipeline.rank):
                assert model.lm_head.weight is model.model.embed_tokens.weight
            fill(model, found)
            for name, p in model.named_parameters():
                assert p.device.type == "cpu"
                yield name, *materialize.local_part(p)


def assert_whole(parts, expected: dict[str, torch.Tensor]) -> None:
    """Every element of every tensor is in some part, and each part has the expected values, bit for bit."""
    seen = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in expected.items()}
    for name, part, first in parts:
        where = tuple(slice(begin, begin + size) for begin, size in zip(first, part.shape, strict=True))
        assert torch.equal(part, expected[name][where]), name
        seen[name][where] = True
    assert all(x.all() for x in seen.values())


def drawn_alone(changes, seed: int) -> dict[str, torch.Tensor]:
    model = on_meta(config_of(changes))
    materialize.allocate([model], torch.device("cpu"))
    materialize.draw_weights(model, distributions(model, model.config), seed)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_draws_the_weights_of_one_process(monkeypatch, mesh):
    changes, sizes, settings = MESHES[mesh]
    monkeypatch.setattr(materialize, "BLOCK", 100)  # several blocks in each parameter, more than a row in each
    expected = drawn_alone(changes, 7)
    fill = lambda model, found: materialize.draw_weights(model, found, 7)  # noqa: E731
    assert_whole(shards(changes, sizes, settings, fill), expected)


def test_weights_are_read_into_shards(tmp_path):
    changes, sizes, settings = MESHES["pp 2 x fsdp 2, interleaved, tied"]
    torch.manual_seed(0)
    model = SidForCausalLM(config_of(changes))
    model.save_pretrained(tmp_path)
    source = SafetensorsCheckpoint(tmp_path)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert_whole(shards(changes, sizes, settings, lambda model, _: materialize.read_weights(model, source)), expected)


def test_distributions_are_those_of_a_model_that_is_built_at_once():
    for changes in (DENSE, DENSE | {"tie_word_embeddings": True, "simplicial_qk_norm": True}, EXPERTS):
        model = SidForCausalLM(config_of(changes | {"hidden_size": 96, "vocab_size": 500}))
        found = distributions(model, model.config)
        assert set(found) >= {name for name, _ in model.named_parameters()}
        drawn = drawn_alone(changes | {"hidden_size": 96, "vocab_size": 500}, 0)
        for name, p in model.named_parameters():
            for x in (p.detach(), drawn[name]):
                spread = found[name].std / (2 * x.numel()) ** 0.5  # of the sample's own standard deviation
                assert float(x.std(correction=0) if found[name].std else x.std()) == pytest.approx(
                    found[name].std, abs=6 * spread
                ), name
                assert float(x.mean()) == pytest.approx(found[name].mean, abs=6 * 2**0.5 * spread), name


def test_seeds_names_and_blocks_draw_apart(monkeypatch):
    monkeypatch.setattr(materialize, "BLOCK", 48)
    one, other = drawn_alone(DENSE, 1), drawn_alone(DENSE, 2)
    rows = [row for x in (*one.values(), *other.values()) if x.ndim == 2 and x.shape[1] == 24 for row in x.unbind()]
    firsts = torch.stack(rows)[:, :4]
    assert len(firsts.unique(dim=0)) == len(rows)


def test_nothing_larger_than_a_block_is_made_besides_the_shards(monkeypatch):
    monkeypatch.setattr(materialize, "BLOCK", 256)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            held = out.to_local() if isinstance(out, DTensor) else out
            if isinstance(held, torch.Tensor) and held.device.type != "meta" and held.is_floating_point():
                made.append((func, held.numel()))
            return out

    with fake_processes(RANKS):
        model = on_meta(config_of(DENSE | {"vocab_size": 4000}))
        found = distributions(model, model.config)
        parallelize(model, build_mesh(ParallelConfig(tp=2), "cpu"), ShardConfig())
        with Watch():
            materialize.allocate([model], torch.device("cpu"))
        largest = 4000 // 4 * 24
        assert max(size for _, size in made) == largest
        made.clear()
        with Watch():
            materialize.draw_weights(model, found, 0)
    fresh = [size for func, size in made if "aten.empty" in str(func)]
    assert fresh and max(fresh) <= 256
    assert {str(func).split(".")[1] for func, size in made if size > 256} <= {"fill_", "detach", "view", "alias"}


def test_one_process_of_16384_of_the_405b_holds_its_share():
    """The whole 405B on the meta device, its plan, and memory for one process; drawing takes seconds more."""
    from sidlm.models import preset

    sizes = ParallelConfig(tp=8, pp=16)
    with fake_processes(16384, rank=3 * 8 + 5):
        model = on_meta(preset("405b", arch="llama"))
        pipeline = parallelize(model, build_mesh(sizes, "cpu"), ShardConfig(pipeline=PipelineConfig(virtual_stages=8)))
        assert pipeline is not None
        materialize.allocate(pipeline.stages, torch.device("cpu"))
        held = sum(materialize.local_part(p)[0].numel() for p in model.parameters())
    assert len(list(itertools.chain(*(stage.layers for stage in pipeline.stages)))) == 8
    assert held == pytest.approx(8 * 126.0**-1 * 403.75e9 / 1024, rel=0.02)

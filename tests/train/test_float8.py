"""float8 training: what is converted, how far the numbers move, and what is refused."""

import copy

import pytest
import torch

from sidlm.cli.train import main
from sidlm.errors import SidError
from sidlm.models import SidForCausalLM, preset
from sidlm.train.float8 import convert
from sidlm.train.metrics import read_json_lines

pytest.importorskip("torchao.float8")
SIZES = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96}  # fmt: skip


def model(**changes):
    torch.manual_seed(0)
    return SidForCausalLM(preset("nano", **SIZES | changes))


def loss_and_gradients(net, device="cpu", precision=torch.float32):
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (2, 128), generator=make).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        loss = net(input_ids=ids, shift_labels=ids, use_cache=False).loss
    net.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in net.named_parameters()}


def assert_close(found, exact, tolerance):
    """Relative to the norms: an e4m3 value has 3 bits of mantissa, so products move by per cents."""
    assert found[0] == pytest.approx(exact[0], rel=tolerance / 20)
    moved = {name: float((found[1][name] - g).norm() / g.norm()) for name, g in exact[1].items()}
    assert max(moved.values()) < tolerance, moved
    assert max(moved.values()) > 1e-4, "nothing was in float8"


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_only_inner_blocks_are_converted(recipe):
    plain = model()
    net = copy.deepcopy(plain)
    names = convert(net, recipe, torch.device("cpu"))
    kinds = {name: type(m).__name__ for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == set(names)
    assert {name.split(".")[2] for name in names} == {"1", "2"} and len(names) == 12
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_close(loss_and_gradients(net), loss_and_gradients(plain), 0.3)


def test_routers_and_own_products_are_left_alone():
    names = convert(model(mlp_sparsity="2:4"), "rowwise", torch.device("cpu"))
    assert not any(".mlp." in name for name in names)
    names = convert(model(num_local_experts=16, num_shared_experts=1), "rowwise", torch.device("cpu"))
    assert not any("router" in name for name in names) and any("shared" in name for name in names)


def test_nothing_to_convert():
    with pytest.raises(SidError, match="none of the 2 blocks has a linear layer to convert"):
        convert(model(num_hidden_layers=2), "rowwise", torch.device("cpu"))


def test_the_command_line(tmp_path, argv):
    """A run in float8 learns, is not the fp32 run, and goes on from a checkpoint."""
    changes = {"train.float8": "rowwise", "train.compile": "off", "train.steps": 4}
    assert main(argv(tmp_path / "plain", **{"train.steps": 4})) == 0
    assert main(argv(tmp_path / "run", **changes | {"train.steps": 2})) == 0
    assert main(argv(tmp_path / "run", **changes)) == 0
    plain, found = (
        [r["loss"] for r in read_json_lines(tmp_path / name / "metrics.jsonl")] for name in ("plain", "run")
    )
    assert found != plain and found == pytest.approx(plain, rel=2e-2)
    with pytest.raises(SidError, match=r"train\.float8 must be|train\.float8: expected one of"):
        main(argv(tmp_path / "bad", **{"train.float8": "int8"}))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(recipe, compiled):
    """Real products against bf16 autocast without float8, also with compiled blocks."""
    plain = model(hidden_size=256, intermediate_size=512, head_dim=64).cuda()
    net = copy.deepcopy(plain)
    convert(net, recipe, torch.device("cuda"))
    torch.compiler.reset()
    for block in net.model.layers if compiled else ():
        block.compile()
    exact = loss_and_gradients(plain, "cuda", torch.bfloat16)
    assert_close(loss_and_gradients(net, "cuda", torch.bfloat16), exact, 0.3)

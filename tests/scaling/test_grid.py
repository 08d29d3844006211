"""What a grid file says, and what is said about mistakes in it."""

import pytest
import yaml

from sidlm.errors import SidError
from sidlm.models.flops import train_flops_per_token
from sidlm.models.presets import preset
from sidlm.scaling.grid import read_grid


def changed(grid, **keys):
    content = yaml.safe_load(grid.read_text())
    for key, value in keys.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    grid.write_text(yaml.safe_dump(content))
    return grid


def test_cells_of_a_grid(grid, tmp_path):
    cells = read_grid(grid, tmp_path / "out", ["--optim.lr", "0.5"])
    assert {cell.name for cell in cells} == {f"{v}/s/640-s{s}" for v in ("sid", "deep") for s in (0, 1)}
    assert [cell.seed for cell in cells] == [0, 0, 1, 1]
    by_name = {cell.name: cell for cell in cells}
    sid, deep = by_name["sid/s/640-s1"], by_name["deep/s/640-s1"]
    assert (sid.cfg.train.steps, sid.tokens, sid.cfg.train.seed) == (5, 640, 1)
    assert sid.cfg.optim.lr == 0.5 and sid.cfg.checkpoint.every == 1
    assert sid.cfg.train.out == str(tmp_path / "out" / "sid/s/640-s1")
    # a variant's own change for a size comes last
    assert (sid.cfg.model.overrides["num_hidden_layers"], deep.cfg.model.overrides["num_hidden_layers"]) == (2, 3)
    model = preset("nano", arch="sid", vocab_size=520, **sid.cfg.model.overrides)
    assert sid.flops == pytest.approx(640 * train_flops_per_token(model, 32))
    assert sid.params > sid.params_non_embedding > 0


def test_tokens_of_flop_budgets(grid, tmp_path):
    cells = read_grid(changed(grid, tokens=None, flops=["1e9", 4e9]), tmp_path)
    assert len(cells) == 8
    for cell in cells:
        budget = 1e9 if "/1e9-" in cell.name else 4e9
        assert cell.flops == pytest.approx(budget, rel=0.5 * 128 * cell.flops_per_token / budget)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sead": [0]}, "unknown key 'sead'; did you mean 'seeds'?"),
        ({"seeds": None}, "seeds is missing or empty"),
        ({"seeds": [0, 0]}, "seeds: [0, 0] names a value twice"),
        ({"seeds": [0.5]}, "seeds: expected whole numbers"),
        ({"variants": None}, "variants is missing"),
        ({"variants": {"a/b": {}}}, "'a/b' is no name"),
        ({"tokens": None}, "give either tokens or flops"),
        ({"flops": [1e9]}, "give either tokens or flops"),
        ({"tokens": ["many"]}, "tokens: expected numbers above 0, got 'many'"),
        ({"tokens": [-5]}, "tokens: expected numbers above 0, got -5"),
        ({"base": "absent.yaml"}, "base: cannot read config absent.yaml"),
        ({"settings": {"optim.lrr": 1}}, "settings: unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"sizes": {"s": {"model.overrides": {"hiden_size": 3}}}}, "did you mean 'hidden_size'"),
        ({"variants": {"a": {"sizes": {"x": {}}}}}, "variants: a: sizes: no size 'x'; there are s"),
        ({"settings": {"validation.every": 0}}, "validation.every is 0"),
        ({"settings": {"optim.lr": -1}}, "optim.lr must be above 0"),
    ],
)
def test_mistakes_are_named(grid, tmp_path, keys, message):
    with pytest.raises(SidError) as error:
        read_grid(changed(grid, **keys), tmp_path)
    assert message in str(error.value)

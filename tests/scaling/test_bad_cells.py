"""Tables that cannot be fitted: one line that says what is missing, status 2."""

from __future__ import annotations

import json

import pytest

from scaling.tables import runs, write_csv
from sidlm.cli.main import main

COLUMNS = ("variant", "params", "tokens", "seed", "loss")


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(rows, columns) -> what `sid scaling fit` says of them."""

    def run(rows, columns=COLUMNS, command="fit"):
        path = rows if not isinstance(rows, list) else write_csv(tmp_path / "cells.csv", rows, columns)
        assert main(["scaling", command, str(path), "--json", str(tmp_path / "out.json")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("sid: error: ") and said.count("\n") == 1
        assert not (tmp_path / "out.json").exists()
        return said

    return run


def test_too_few_cells(refused):
    rows = [row for row in runs() if row["params"] < 5e7]
    assert "too few cells to fit variant a: 10 points (params, tokens) of 2 sizes and 5 token budgets" in refused(rows)
    rows = [row for row in runs() if row["tokens"] < 1e9]
    assert "of 5 sizes and 2 token budgets" in refused(rows)


def test_a_missing_seed(refused):
    rows = [*runs("a"), *runs("b", rng=1)]
    gone = [row for row in rows if not (row["variant"] == "b" and row["seed"] == 2)]
    assert "variant b has no run of seed 2 at params 1e+07, tokens 2e+08; other cells have seeds 0, 1, 2" in refused(
        gone
    )
    assert "variant b has no run of seed 2 at params 1e+09, tokens 2e+10" in refused(rows[:-1])


@pytest.mark.parametrize("value", ["nan", "inf", "", "-1", "0", "high"])
def test_a_loss_that_is_no_number(refused, value):
    rows = runs()
    rows[4]["loss"] = value
    said = refused(rows)
    assert "line 6: loss is" in said and repr(value) in said and "(variant a, params 10000000, tokens" in said


def test_mixed_tokenizers(refused):
    rows = [row | {"tokenizer": "one" if row["seed"] else "two"} for row in runs()]
    said = refused(rows, (*COLUMNS, "tokenizer"))
    assert "losses of 2 tokenizers cannot be compared: tokenizer is two in" in said and "line 2" in said


def test_missing_columns_name_the_nearest(refused):
    rows = [row | {"losss": row["loss"]} for row in runs()]
    said = refused(rows, ("variant", "params", "tokens", "seed", "losss"))
    assert "no column 'loss', there are variant, params, tokens, seed, losss; did you mean 'losss'?" in said


def test_a_run_twice_and_ragged_lines(refused, tmp_path):
    rows = runs()
    assert "line 77: the run of" in refused([*rows, rows[0]])
    path = write_csv(tmp_path / "ragged.csv", rows)
    path.write_text(path.read_text() + "a,1,2\n")
    assert "line 77: expected 5 values" in refused(path)


def test_failed_cells_and_broken_files(refused, tmp_path):
    path = tmp_path / "cells.jsonl"
    rows = runs()
    rows[3] |= {"loss": None, "error": "out of memory", "name": "a/s/1-s0"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "line 4: cell a/s/1-s0 has no loss: out of memory" in refused(path)
    path.write_text("{broken\n")
    assert "line 1: not JSON" in refused(path)
    path.write_text("")
    assert "is empty" in refused(path)
    path.write_bytes(b"variant\xff\n")
    assert "is not UTF-8" in refused(path)
    assert "cannot read cells" in refused(tmp_path / "absent.csv")


def test_comparisons_need_two_variants(refused, capsys):
    assert "has one variant" in refused(runs(), command="efficiency")
    assert main(["scaling", "fitt"]) == 2 and "did you mean 'fit'?" in capsys.readouterr().err


def test_one_missing_size_in_a_baseline_name(tmp_path, capsys):
    path = write_csv(tmp_path / "cells.csv", runs())
    assert main(["scaling", "fit", str(path), "--baseline", "b"]) == 2
    assert "--baseline b: no such variant, there are a" in capsys.readouterr().err

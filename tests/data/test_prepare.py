import json

import pytest

from sidlm.data import Tokenizer, prepare_tokenizer
from sidlm.data.cache import text_hash
from sidlm.data.prepare import sample_texts
from sidlm.errors import SidError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_trains_saves_and_remembers(tmp_path, cfg, texts):
    source = write(tmp_path / "a.jsonl", texts)
    lines: list[str] = []
    config = cfg(train=(source,), vocab_size=560)
    first = prepare_tokenizer(config, tmp_path / "one", log=lines.append)
    assert first.vocab_size == 560
    assert len(first.special_ids) == 256
    assert "training a tokenizer" in lines[0]
    assert Tokenizer.load(tmp_path / "one").fingerprint == first.fingerprint
    again = prepare_tokenizer(config, tmp_path / "two", log=lines.append)
    assert again.fingerprint == first.fingerprint
    assert len(lines) == 1
    assert (tmp_path / "two/tokenizer.json").read_bytes() == (tmp_path / "one/tokenizer.json").read_bytes()
    elsewhere = cfg(train=(source,), vocab_size=560, cache_dir=str(tmp_path / "other"))
    assert prepare_tokenizer(elsewhere, tmp_path / "three").fingerprint == first.fingerprint
    assert prepare_tokenizer(cfg(train=(source,), vocab_size=540), tmp_path / "four").vocab_size == 540


def test_given_tokenizer_is_copied(tmp_path, cfg, tokenizer):
    tokenizer.save(tmp_path / "tok")
    got = prepare_tokenizer(cfg(train=("missing",), tokenizer=str(tmp_path / "tok")), tmp_path / "out")
    assert got.fingerprint == tokenizer.fingerprint == Tokenizer.load(tmp_path / "out").fingerprint
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        prepare_tokenizer(cfg(tokenizer=str(tmp_path / "nowhere")), tmp_path / "out")


def test_too_small(tmp_path, cfg, texts):
    with pytest.raises(ValueError, match="vocab_size 300 is too small"):
        prepare_tokenizer(cfg(train=(write(tmp_path / "a.jsonl", texts),), vocab_size=300), tmp_path / "x")
    (tmp_path / "file").touch()
    config = cfg(train=(write(tmp_path / "a.jsonl", texts),), vocab_size=560)
    with pytest.raises(SidError, match=r"cannot save the tokenizer in .*file"):
        prepare_tokenizer(config, tmp_path / "file")


def test_sample_is_bounded_and_shared(tmp_path, cfg):
    a = write(tmp_path / "a.jsonl", ["a" * 100 + str(i) for i in range(1000)])
    b = write(tmp_path / "b.jsonl", ["b" * 100 + str(i) for i in range(1000)])
    c = write(tmp_path / "c.jsonl", ["c" * 100])

    def sample(*train, size=20_000):
        text = "".join(sample_texts(cfg(train=train, valid_fraction=0.0), size))
        assert len(text) <= size
        return [text.count(letter) for letter in "abc"]

    for counts, want in [(sample(a, b), [9800, 9800, 0]), (sample(f"{a}=3", f"{b}=1"), [14700, 4900, 0])]:
        assert counts == pytest.approx(want, abs=150)
    assert sample(a, c)[2] == 100  # what a small source leaves goes to the others
    assert sum(sample(a, c)) > 19_000
    assert sample(a, size=10**9) == [100_000, 0, 0]


def test_sample_leaves_held_out_text_alone(tmp_path, cfg, texts):
    source = write(tmp_path / "a.jsonl", texts)
    kept = list(sample_texts(cfg(train=(source,), valid_fraction=0.3)))
    assert kept == [text for text in texts if text_hash(text) >= int(0.3 * 2**64)]
    assert 0 < len(kept) < len(texts)
    assert list(sample_texts(cfg(train=(source,), valid=("x",), valid_fraction=0.3))) == texts


def test_sample_of_a_folder_is_not_one_corner_of_it(tmp_path, cfg):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / f"in/{i:02}.txt").write_text(f"{i:02}" * 50)
    got = [int(text[:2]) for text in sample_texts(cfg(train=(str(tmp_path / "in"),), valid_fraction=0.0), 1000)]
    assert len(got) == 10
    assert max(got) > 20 and min(got) < 20

import pytest

from sidlm.data.config import DataConfig, Source, parse_source


def test_parse_source(tmp_path, monkeypatch):
    assert parse_source("a/b.jsonl=0.25") == Source("a/b.jsonl", 0.25)
    assert parse_source("a/b.jsonl") == Source("a/b.jsonl", None)
    assert parse_source("hf:org/name:train=2") == Source("hf:org/name:train", 2.0)
    assert parse_source("date=today") == Source("date=today", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "date=2024").mkdir()
    assert parse_source("date=2024") == Source("date=2024", None)
    assert parse_source("date=2024=3") == Source("date=2024", 3.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": ()}, "data.train is empty"),
        ({"train": "embedded"}, "list of sources"),
        ({"train": ("a=0.5", "b")}, "'b' has no weight"),
        ({"train": ("a=0",)}, "every weight is 0"),
        ({"train": ("a=nan",)}, "from 0 on, got nan"),
        ({"train": ("",)}, "empty string"),
        ({"train": ("=2",)}, "no path"),
        ({"valid": ("a=2",)}, "has a weight"),
        ({"valid_fraction": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"text_key": ""}, "text_key"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**change)


def test_cache_folder_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("SID_CACHE", str(tmp_path))
    assert DataConfig().cache_path == tmp_path
    assert DataConfig(cache_dir="elsewhere").cache_path.name == "elsewhere"
    monkeypatch.delenv("SID_CACHE")
    assert DataConfig().cache_path.parts[-2:] == (".cache", "sid")

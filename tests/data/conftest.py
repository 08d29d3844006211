import pytest

from sidlm.data.tokenizer import Tokenizer, train_tokenizer

TEXT = "the cat sat on a mat and saw 12 dogs, 345 birds; naïve café façade über 数学 🎉 def f(x): return x + 1\n\n"
WORDS = TEXT.split(" ")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(30 + i % 50)) for i in range(200)]


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return train_tokenizer(texts, 340, num_special=16)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A DataConfig maker whose cache lies in tmp_path."""
    from sidlm.data.config import DataConfig

    monkeypatch.setenv("SID_CACHE", str(tmp_path / "cache"))
    return DataConfig

"""Ranks files against tiktoken, which they come from, and against Llama 3's own tokenizer (package llama-models)."""

import base64
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.data.ranks import merges_of, read_ranks
from sidlm.data.tokenizer import SPLIT_PATTERN, Tokenizer, special_tokens
from sidlm.errors import SidError

BYTES = [bytes((i,)) for i in range(256)]
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def write(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return path


def grown(seed: int, count: int) -> list[bytes]:
    """Tokens that are each made of two earlier ones, as byte-pair training makes them; many from few letters."""
    rng, tokens = random.Random(seed), list(BYTES)
    seen = set(tokens)
    while len(tokens) < 256 + count:
        pool = [b"a", b"b", b" ", b"\xc3", b"\xa9", *tokens[256:]]
        token = rng.choice(pool) + rng.choice(pool)
        if token not in seen and len(token) < 12:
            seen.add(token)
            tokens.append(token)
    return tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("ranks") / "tokenizer.model", grown(0, 300))
    return Tokenizer.load(path), path


def test_layout(small):
    tokenizer, path = small
    assert tokenizer.vocab_size == 556 + 256
    assert list(tokenizer.special_ids) == special_tokens() and tokenizer.bos_id == 556
    assert tokenizer.special_ids["<|eot_id|>"] == 556 + 9 and tokenizer.chat_template is not None
    assert Tokenizer.load(path.parent).fingerprint == tokenizer.fingerprint


def test_merges_are_every_pair_in_order_of_its_result():
    tokens = [*BYTES, b"ab", b"bc", b"abc"]
    assert merges_of(tokens) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


@pytest.mark.parametrize("seed", range(4))
def test_ids_are_tiktokens(tmp_path, seed):
    tiktoken = pytest.importorskip("tiktoken")
    tokens = grown(seed, 300)
    tokenizer = Tokenizer.load(write(tmp_path / "tokenizer.model", tokens))
    theirs = tiktoken.Encoding(
        "x", pat_str=SPLIT_PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={}
    )
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choice(["a", "b", " ", "é", "ab", "aa", "\n", "1"]) for _ in range(rng.randrange(40)))
        assert tokenizer.encode(text) == theirs.encode(text, disallowed_special=()), text


def test_saved_as_tokenizer_json_it_is_the_same(small, tmp_path):
    tokenizer, _ = small
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("ab é abab <|eot_id|>") == tokenizer.encode("ab é abab <|eot_id|>")


@pytest.fixture(scope="module")
def llama_3():
    theirs = pytest.importorskip("llama_models.llama3.tokenizer")
    return Tokenizer.load(Path(theirs.__file__).parent / "tokenizer.model"), theirs.Tokenizer.get_instance()


def test_llama_3_ids_on_any_text(llama_3):
    mine, theirs = llama_3
    assert mine.vocab_size == theirs.n_words == 128256
    assert (mine.bos_id, mine.eos_id, mine.pad_id) == (theirs.bos_id, theirs.eos_id, theirs.pad_id)
    named = {name: i for name, i in mine.special_ids.items() if "reserved" not in name and "step" not in name}
    assert all(theirs.special_tokens[name] == i for name, i in named.items())

    @given(ANY_TEXT)
    @settings(max_examples=300, deadline=None)
    def same(text):
        assert mine.encode(text) == theirs.encode(text, bos=False, eos=False)

    same()


def test_llama_3_ids_on_a_corpus(llama_3):
    """The Python that runs this: code, prose in docstrings, and the many scripts of its tables and tests."""
    mine, theirs = llama_3
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("encodings/*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files[::9]]
    points = (range(0x20, 0xD800), range(0xE000, 0x30000))
    texts += ["".join(map(chr, points[0][i : i + 97])) for i in range(0, len(points[0]), 997)]
    texts += ["".join(map(chr, points[1][i : i + 97])) for i in range(0, len(points[1]), 2003)]
    assert sum(map(len, texts)) > 300_000
    for text, ids in zip(texts, mine.encode_batch(texts), strict=True):
        assert ids == theirs.encode(text[:400_000], bos=False, eos=False)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([b"AA== 0", b"AQ=="], "line 2: expected a token in base64 and its rank, found 1 words"),
        ([b"AA== 0", b"A*== 1"], "line 2: expected a token in base64"),
        ([b"AA== 0", b"AQ== x"], "line 2: expected a token in base64 and its rank: invalid literal"),
        ([b"AA== 0", b"AQ== 2"], "line 2: rank 2 where 1 is next"),
        ([b"AA== 0", b"AA== 1"], "line 2: the token of rank 0 again"),
        ([b"AA== 0", b" 1"], "line 2: expected"),
        ([b"AA== 0"], "255 of the 256 single bytes have no token, the first is 0x01"),
        ([b"\x0a\x0e\x00 <unk> \x15"], "line 2: expected a token in base64"),  # SentencePiece, Llama 2's
    ],
)
def test_other_files_are_refused(tmp_path, lines, error):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(SidError, match=error):
        read_ranks(path)


def test_a_token_without_end_is_refused(tmp_path):
    with pytest.raises(SidError, match="line 257: a token of 5000 bytes"):
        read_ranks(write(tmp_path / "tokenizer.model", [*BYTES, b"a" * 5000]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ranks file at"):
        read_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "tokenizer.model")

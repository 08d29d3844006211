import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.data.tokenizer import Tokenizer, clean, special_tokens, train_tokenizer
from sidlm.errors import SidError

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
AWKWARD = (
    "naïve 🎉👩‍👩‍👧 \x00\x01\x7f\x85\u2028\ufeff\u200d  \r\n\t\n\n   x  'S 'll 1234567 ǅ \U0010ffff e\u0301 한국어"
)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def auto(saved):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


def test_layout_is_llama_3s(tokenizer):
    names = special_tokens()
    assert len(names) == len(set(names)) == 256
    assert names[:5] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
    ]
    assert names[5:12] == [
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_2|>",
    ]
    assert names[-1] == "<|reserved_special_token_246|>"
    assert tokenizer.vocab_size == len(tokenizer) == 340
    assert list(tokenizer.special_ids.values()) == list(range(324, 340))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (324, 325, 328)


def test_split_rule():
    from tokenizers import Regex, pre_tokenizers

    from sidlm.data.tokenizer import SPLIT_PATTERN

    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("I'LL pay $12345 now!!\n\n  x  \n y_z")]
    assert pieces == ["I", "'LL", " pay", " $", "123", "45", " now", "!!\n\n", " ", " x", "  \n", " y", "_z"]


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())


def test_round_trip_of_awkward_text_and_surrogates(tokenizer):
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert clean("a\ud800b") == "a\ufffdb"
    assert clean("\ud83c\udf89") == "🎉"
    assert tokenizer.decode(tokenizer.encode("a\udc80")) == "a\ufffd"
    assert tokenizer.encode("") == []


def fuzz(names: list[str], rng: random.Random) -> str:
    def noise() -> str:
        points = (
            rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(9)
        )
        return "".join(map(chr, points))[: rng.randrange(10)]

    return noise() + "".join(rng.choice(names) + rng.choice(("", " ", "\n", noise())) for _ in range(20)) + noise()


def test_user_text_never_becomes_special(tokenizer, auto):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    forbidden = set(tokenizer.special_ids.values())
    for _ in range(100):
        text = fuzz(list(tokenizer.special_ids), rng)
        ids = tokenizer.encode(text)
        assert not forbidden & set(ids), f"seed {seed}"
        assert tokenizer.decode(ids) == text, f"seed {seed}"
        assert tokenizer.encode_batch([text, text]) == [ids, ids], f"seed {seed}"
        plain = auto(text, add_special_tokens=False, split_special_tokens=True)
        assert plain.input_ids == ids, f"seed {seed}"
        assert auto.decode(ids) == text, f"seed {seed}"


def test_auto_tokenizer(tokenizer, auto, tmp_path):
    assert auto("hello").input_ids == [tokenizer.bos_id, *tokenizer.encode("hello")]
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (324, 325, 328)
    assert len(auto) == 340
    assert auto.convert_tokens_to_ids("<|eot_id|>") == tokenizer.special_ids["<|eot_id|>"]
    auto.save_pretrained(tmp_path)  # and back again
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_save_and_load(tokenizer, saved):
    for path in (saved, saved / "tokenizer.json", str(saved)):
        again = Tokenizer.load(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(AWKWARD) == tokenizer.encode(AWKWARD)
        assert (again.bos_id, again.eos_id, again.pad_id) == (324, 325, 328)
    assert sorted(p.name for p in saved.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_training_is_deterministic(texts, tokenizer):
    assert train_tokenizer(iter(texts), 340, num_special=16).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(texts[1:], 340, num_special=16).fingerprint != tokenizer.fingerprint


def test_little_text_gives_a_smaller_vocabulary():
    small = train_tokenizer(["ab ab"], 4096)
    assert 512 < small.vocab_size < 520
    assert list(small.special_ids.values()) == list(range(small.vocab_size - 256, small.vocab_size))


def test_sizes_are_checked(tokenizer):
    with pytest.raises(ValueError, match=r"at least 11 .* got 10"):
        train_tokenizer(["x"], 4096, num_special=10)
    with pytest.raises(ValueError, match=r"vocab_size 300 .* 512"):
        train_tokenizer(["x"], 300)
    with pytest.raises(ValueError, match=r"token id 340 .* 340"):
        tokenizer.decode([1, 340])


def foreign(specials: list[str], *, special: bool = True):
    """A byte-level BPE whose first ids are the given tokens, as other trainers make them."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=special, normalized=False) for name in specials],
    )
    backend.train_from_iterator(["hello world, hello there"] * 9, trainer)
    return backend


def test_foreign_tokenizer_is_safe(tmp_path):
    from transformers import AutoTokenizer

    backend = foreign(["<|endoftext|>"])
    backend.enable_truncation(3)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.bos_id == loaded.eos_id == loaded.pad_id == 0
    text = "hello<|endoftext|> world" + AWKWARD
    assert loaded.decode(loaded.encode(text)) == text
    assert 0 not in loaded.encode(text)
    loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "chat_template.jinja").exists()  # it has no control tokens for one
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto(text, split_special_tokens=True).input_ids == [0, *loaded.encode(text)]
    assert Tokenizer.load(tmp_path / "saved").fingerprint == loaded.fingerprint


def test_foreign_added_token_that_is_not_special_becomes_so(tmp_path):
    foreign(["</s>"], special=False).save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token == "</s>"
    assert loaded.eos_id not in loaded.encode("a</s>b")


def test_foreign_config_names_the_ends(tmp_path):
    foreign(["<A>", "<B>", "<s>"]).save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<A>"}, "eos_token": "<B>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(SidError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(file)
    foreign(["<x>"]).save(str(file))
    with pytest.raises(SidError, match=r"no begin- or end-of-text token .*<x>"):
        Tokenizer.load(file)
    foreign(["</s>", "h"]).save(str(file))  # ordinary text is a special token
    with pytest.raises(SidError, match="'h' encodes to special token"):
        Tokenizer.load(file)

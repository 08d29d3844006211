from __future__ import annotations

import io

import pytest
import torch

from sidlm.cli.generate import TextStream
from sidlm.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["abc"], 512)  # bytes only: every character beyond ASCII takes several tokens


@pytest.mark.parametrize("text", ["plain", "naïve — 数学 😀!", "ends in 😀", "", "\ufffd kept \ufffd"])
def test_stream_emits_whole_characters_only(tokenizer, text):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer.encode(text)
    for token in ids:
        stream.put(torch.tensor([token]))
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
            assert text.startswith("".join(pieces))
    stream.put(torch.tensor([tokenizer.eos_id]))
    stream.end()
    assert "".join(pieces) == text
    assert stream.tokens == [*ids, tokenizer.eos_id]


def test_stream_shows_bytes_that_are_really_broken(tokenizer):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([0]))
    broken = tokenizer.encode("é")[:1]
    for token in [*tokenizer.encode("a"), *broken, *tokenizer.encode("b"), *broken]:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == "a\ufffdb"
    stream.end()
    assert "".join(pieces) == "a\ufffdb\ufffd"


def test_generate_streams_a_continuation(sid, demo_run):
    status, out, err = sid("generate", demo_run, "The cat", "--max-new-tokens", 12, "--greedy")
    assert status == 0 and not err
    assert out.startswith("The cat") and out.endswith("\n") and len(out) > len("The cat\n")
    assert sid("generate", demo_run / "model", "The cat", "--max-new-tokens", 12, "--temperature", 0) == (0, out, "")


def test_greedy_text_is_that_of_the_whole_sequence(sid, demo_run):
    """The streamed text against an argmax loop without a cache."""
    from sidlm.models import SidForCausalLM

    model = SidForCausalLM.from_pretrained(demo_run / "model").eval()
    tokenizer = Tokenizer.load(demo_run / "model")
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    for _ in range(12):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_id:
            break
    assert sid("generate", demo_run, "The cat", "--max-new-tokens", 12, "--greedy")[1] == (
        tokenizer.decode(ids, skip_special=True) + "\n"
    )


def test_seed_decides_the_samples_and_num_gives_several(sid, demo_run):
    options = ("generate", demo_run, "The", "--max-new-tokens", 16, "--temperature", 1.5, "--num", 2)
    first = sid(*options, "--seed", 1)[1]
    assert first == sid(*options, "--seed", 1)[1] != sid(*options, "--seed", 2)[1]
    head, one, two = first.partition("--- 1/2\n")[2].partition("--- 2/2\n")
    assert head != two and head.startswith("The") and two.startswith("The") and one


def test_prompt_from_standard_input_and_special_text_stays_text(sid, demo_run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("<|end_of_text|> The"))
    status, out, _ = sid("generate", demo_run, "-", "--max-new-tokens", 2)
    assert status == 0 and out.startswith("<|end_of_text|> The")


def test_too_many_tokens_for_the_model(fails, demo_run):
    assert "300 new ones exceed the model's 256 positions" in fails(
        "generate", demo_run, "The", "--max-new-tokens", 300
    )


GREEDY = ("generate", "MODEL", "The cat sees The cat sees The cat", "--max-new-tokens", 12, "--greedy")


def greedy(sid, demo_run, *options):
    status, out, err = sid(*(demo_run if word == "MODEL" else word for word in GREEDY), *options)
    assert status == 0, err
    return out


@pytest.mark.parametrize(
    "options",
    [("--prompt-lookup", 3), ("--cache", "static"), ("--assistant", "MODEL"), ("--prefill-chunk", 2),
     ("--prompt-lookup", 2, "--prefill-chunk", 3), ("--top-k", 5), ("--min-p", 0.5)],
    ids=str,
)  # fmt: skip
def test_ways_to_generate_the_same_greedy_text(sid, demo_run, options):
    options = tuple(demo_run if word == "MODEL" else word for word in options)
    assert greedy(sid, demo_run, *options) == greedy(sid, demo_run)


def test_beams_are_written_at_the_end(sid, demo_run):
    out = greedy(sid, demo_run, "--num-beams", 3)
    assert out.startswith("The cat sees The cat sees The cat") and len(out) > 40


def test_repetition_penalty_changes_the_text(sid, demo_run):
    assert greedy(sid, demo_run, "--repetition-penalty", 3.0) != greedy(sid, demo_run)


def test_stop_strings_end_before_them(sid, demo_run):
    text = greedy(sid, demo_run)[len(GREEDY[2]) : -1]
    stop = text[len(text) // 2 :][:3]
    assert greedy(sid, demo_run, "--stop", stop, "--stop", "never")[len(GREEDY[2]) : -1] == text[: text.index(stop)]


def test_json_schema(sid, demo_run, tmp_path, fails):
    pytest.importorskip("llguidance")
    import json

    file = tmp_path / "schema.json"
    properties = {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}
    file.write_text(json.dumps({"type": "object", "properties": properties, "required": ["a", "b"]}))
    options = ("generate", demo_run, "x", "--json-schema", file, "--max-new-tokens", 60, "--num", 2)
    status, out, err = sid(*options)
    assert status == 0, err
    values = [json.loads(part.partition("\nx")[2]) for part in out.split("--- ")[1:]]
    assert len(values) == 2 and all(value["a"] in (1, 2) and isinstance(value["b"], bool) for value in values)
    assert "--json-schema does not go with --num-beams" in fails(*options, "--num-beams", 2)
    file.write_text("{")
    assert "schema.json is not JSON" in fails(*options)
    file.write_text("[]")
    assert "holds no JSON schema but list" in fails(*options)
    file.write_text('{"type": "strin"}')
    assert "schema" in fails(*options)
    assert "nothing.json: No such file" in fails("generate", demo_run, "x", "--json-schema", tmp_path / "nothing.json")


def test_an_assistant_with_another_tokenizer_is_refused(fails, demo_run, tmp_path, tokenizer):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(demo_run / "model", other)
    tokenizer.save(other)
    assert "has another tokenizer than the model" in fails("generate", demo_run, "x", "--assistant", other)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(fails, demo_run, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(demo_run / "model", other)
    train_tokenizer(["abc"], 1000, num_special=1000 - 256).save(other)
    assert "the tokenizer has 1000 tokens but the model only" in fails("generate", other, "x")

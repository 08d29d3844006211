from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.errors import SidError
from sidlm.serve.decode import Sampling, decode
from sidlm.serve.text import Detokenizer

pytest.importorskip("llguidance")

from sidlm.serve.grammar import GrammarCompiler

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 3, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def write(model, tokenizer, grammar, **rules):
    rules = {"max_new_tokens": 120, "temperature": 1.5} | rules
    chosen = list(decode(model, [1, 2, 3], Sampling(**rules), stop_ids={tokenizer.eos_id}, grammar=grammar))
    text = Detokenizer(tokenizer)
    return text.feed(c.id for c in chosen) + text.end(), chosen


@pytest.mark.parametrize("seed", range(5))
def test_a_random_model_writes_what_the_schema_says(model, tokenizer, compiler, seed):
    text, chosen = write(model, tokenizer, compiler.json(PERSON), seed=seed)
    value = json.loads(text)
    assert chosen[-1].finish == "stop" and set(value) == {"name", "age", "tags"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert 3 <= value["age"] <= 99 and 1 <= len(value["tags"]) <= 2 and set(value["tags"]) <= {"a", "é"}


def test_without_the_grammar_it_does_not(model, tokenizer):
    with pytest.raises(ValueError):
        json.loads(write(model, tokenizer, None, seed=0)[0])


def test_a_number_may_end_where_it_is_one(model, tokenizer, compiler):
    """Stop tokens are possible exactly where the text could end."""
    for seed in range(5):
        text, chosen = write(model, tokenizer, compiler.json({"type": "integer"}), seed=seed, max_new_tokens=200)
        assert isinstance(json.loads(text), int) or chosen[-1].finish == "length"
    grammar = compiler.json({"type": "integer"})
    assert not grammar.allowed(tokenizer.vocab_size, [7])[7]
    grammar.consume(tokenizer.encode("5")[0])
    mask = grammar.allowed(tokenizer.vocab_size, [7])
    assert mask[7] and mask[tokenizer.encode("5")[0]] and not mask[tokenizer.encode("x")[0]]


def test_rows_of_a_larger_vocabulary_are_never_allowed(compiler, tokenizer):
    mask = compiler.json(PERSON).allowed(tokenizer.vocab_size + 50, [])
    assert len(mask) == tokenizer.vocab_size + 50 and not mask[tokenizer.vocab_size :].any() and mask.any()
    assert torch.equal(mask[: tokenizer.vocab_size], compiler.json(PERSON).allowed(tokenizer.vocab_size, []))


def test_a_call_of_one_of_the_tools(model, tokenizer, compiler):
    tools = [{"name": "f", "parameters": PERSON}, {"name": "g"}]
    names = set()
    for seed in range(3):
        text, _ = write(model, tokenizer, compiler.call([tools[0]]), seed=seed)
        assert json.loads(text)["name"] == "f" and 3 <= json.loads(text)["parameters"]["age"] <= 99
        names.add(write(model, tokenizer, compiler.call(tools), seed=seed, max_new_tokens=30)[0][:34])
    assert len(names) > 1


def test_a_copy_goes_on_by_itself(compiler, tokenizer):
    grammar = compiler.json({"const": "ab"})
    other = grammar.copy()
    for token in tokenizer.encode('"ab"'):
        grammar.consume(token)
    assert grammar.complete and not other.complete


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": "object", "properties": 3},
        {"type": "string", "pattern": "("},
        {"if": {"type": "string"}, "then": {"minLength": 3}},
        {"minimum": 3, "maximum": 2, "type": "integer"},
        {"$ref": "https://example.com/x"},
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(compiler, schema):
    with pytest.raises(SidError, match="schema"):
        compiler.json(schema)


SCHEMAS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from(["string", "#", "#/$defs/a", "("])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "properties", "items", "anyOf", "$ref", "$defs", "enum", "const", "pattern",
                             "minLength", "required", "maximum", "x-guidance", "additionalProperties", "a"]),
            inner, max_size=4,
        ),
    ),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["type", "properties", "anyOf", "$ref", "$defs", "items"]), SCHEMAS, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_schema_compiles_or_is_refused(compiler, tokenizer, schema):
    try:
        grammar = compiler.json(schema)
        grammar.allowed(tokenizer.vocab_size, [0])
    except SidError as error:
        assert "schema" in str(error)

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sidlm.data import Batch, Data, Loader, open_data, prepare_tokenizer
from sidlm.data.cache import text_hash
from sidlm.data.loader import held_out_hashes
from sidlm.errors import SidError

FIELDS = ("tokens", "labels", "positions", "doc_ids")


def write(path, texts, domain=None):
    rows = [{"text": text, **({"domain": domain} if domain else {})} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@pytest.fixture
def two(tmp_path, texts):
    return write(tmp_path / "a.jsonl", texts[:150], "a"), write(tmp_path / "b.jsonl", texts[150:], "b")


@pytest.fixture(params=["pooled", "weighted"])
def data(request, two, cfg, tokenizer) -> Data:
    train = two if request.param == "pooled" else (f"{two[0]}=0.3", f"{two[1]}=0.7")
    return open_data(cfg(train=train, seq_len=200, valid_fraction=0.05), tokenizer)


def test_batch(data, tokenizer):
    batch = Loader(data.train, batch_size=6, seed=3).batch(2)
    for name in FIELDS:
        assert getattr(batch, name).shape == (6, 200)
        assert getattr(batch, name).dtype == torch.int64
    assert len(batch) == 6
    assert equal(batch[2:4].to("cpu"), Batch(*(getattr(batch, name)[2:4] for name in FIELDS)))
    starts = batch.tokens == tokenizer.bos_id
    assert torch.equal(batch.positions == 0, starts | (torch.arange(200) == 0))
    assert torch.equal(batch.labels == -100, batch.tokens == tokenizer.eos_id)
    assert torch.equal(batch.doc_ids.diff(dim=1) == 1, starts[:, 1:])
    inside = batch.labels[:, :-1] != -100
    assert torch.equal(batch.labels[:, :-1][inside], batch.tokens[:, 1:][inside])


def test_rows_are_made_of_training_documents(data, tokenizer, texts):
    documents = {tuple([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts}
    batch = Loader(data.train, batch_size=8, seed=3).batch(0)
    found = 0
    for row, ids in zip(batch.tokens, batch.doc_ids, strict=True):
        for document in range(1, int(ids.max())):  # whole ones
            assert tuple(row[ids == document].tolist()) in documents
            found += 1
    assert found > 5


def test_batch_is_a_pure_function_and_world_only_cuts_it(data):
    whole = Loader(data.train, batch_size=12, seed=5)
    batches = [whole.batch(step) for step in range(60)]
    fresh = Loader(data.train, batch_size=12, seed=5)
    for step in (59, 0, 17):
        assert equal(fresh.batch(step), batches[step])
        for world in (2, 3, 4, 12):
            parts = [Loader(data.train, batch_size=12, seed=5, rank=r, world=world).batch(step) for r in range(world)]
            assert all(len(part) == 12 // world for part in parts)
            assert equal(Batch(*(torch.cat([getattr(p, name) for p in parts]) for name in FIELDS)), batches[step])
    assert not equal(Loader(data.train, batch_size=12, seed=6).batch(0), batches[0])
    # a larger batch is the same samples, more at a time
    assert torch.equal(Loader(data.train, batch_size=24, seed=5).batch(1).tokens[:12], batches[2].tokens)


def test_loader_arguments(data):
    with pytest.raises(ValueError, match="batch_size 10 is not divisible by the 4"):
        Loader(data.train, batch_size=10, seed=0, world=4)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        Loader(data.train, batch_size=2, seed=0, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Loader(data.train, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="start at 0, got -2"):
        Loader(data.train, batch_size=2, seed=0).batch(-1)


def test_weights_are_shares_of_tokens(tmp_path, two, cfg, tokenizer):
    big = write(tmp_path / "big.jsonl", ["z" * 300] * 500)
    train = open_data(cfg(train=(f"{two[0]}=3", f"{big}=1"), seq_len=32, valid_fraction=0.0), tokenizer).train
    assert train.mixture.counts.tolist() == [768, 256]
    tokens = Loader(train, batch_size=1024, seed=1).batch(0).tokens
    z_rows = torch.isin(tokens, torch.tensor(tokenizer.encode("z" * 300))).float().mean(1) > 0.5
    assert int(z_rows.sum()) == 256


def test_without_weights_an_epoch_is_every_document_once(two, cfg, tokenizer, texts):
    train = open_data(cfg(train=two, seq_len=1, valid_fraction=0.0), tokenizer).train
    assert len(train.streams) == 1
    tokens = Loader(train, batch_size=train.num_tokens, seed=1).batch(0).tokens.ravel().numpy()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
    got = sorted(tuple(document.tolist()) for document in documents)
    assert got == sorted((tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id) for text in texts)


def test_counts(two, cfg, tokenizer, texts):
    train = open_data(cfg(train=two, valid_fraction=0.0), tokenizer).train
    sizes = [sum(len(tokenizer.encode(t)) + 2 for t in part) for part in (texts[:150], texts[150:])]
    assert train.tokens_by_source == dict(zip(two, sizes, strict=True))
    assert train.tokens_by_domain == {"a": sizes[0], "b": sizes[1]}
    assert train.num_tokens == sum(sizes)
    assert train.num_documents == 200


def test_fingerprint_follows_content(tmp_path, two, cfg, tokenizer, texts):
    def of(**change):
        return open_data(cfg(**{"train": two, **change}), tokenizer).train.fingerprint

    base = of()
    assert of() == base
    assert of(valid_fraction=0.1) != base
    assert of(train=(f"{two[0]}=1", f"{two[1]}=1")) != base
    moved = write(tmp_path / "moved.jsonl", texts[:150], "a")
    assert of(train=(moved, two[1])) == base


def test_held_out_documents(two, cfg, tokenizer, texts):
    data = open_data(cfg(train=two, valid_fraction=0.1), tokenizer)
    held = {document.text for document in data.valid}
    assert held < set(texts)
    assert len(data.valid) + data.train.num_documents == 200
    assert 10 < len(data.valid) < 60
    below = {text for text in texts if text_hash(text) < 0.1 * 2**64}
    assert below <= held
    for document in data.valid:
        assert document.num_bytes == len(document.text.encode())
        assert document.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
        assert document.domain == ("a" if document.text in texts[:150] else "b")
    assert data.valid.num_bytes == sum(d.num_bytes for d in data.valid)
    assert data.valid.num_tokens == sum(len(d.tokens) for d in data.valid)
    assert data.valid[-1].text == data.valid[len(data.valid) - 1].text == data.valid[-1:][0].text
    with pytest.raises(IndexError):
        data.valid[len(data.valid)]
    other = open_data(cfg(train=two[::-1], valid_fraction=0.1), tokenizer)  # order does not matter
    assert {document.text for document in other.valid} == held


def test_held_out_hashes():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    domains = np.zeros(len(hashes), np.int64)
    assert held_out_hashes(hashes, domains, 0.01).tolist() == sorted(hashes[hashes < np.uint64(0.01 * 2**64)])
    assert len(held_out_hashes(hashes, domains, 0.0)) == 0
    few = np.array([2**64 - 1, 2**64 - 2, 2**64 - 3], np.uint64)  # chance leaves none below
    assert held_out_hashes(few, np.zeros(3, np.int64), 0.01).tolist() == [2**64 - 3]
    assert held_out_hashes(few, np.zeros(3, np.int64), 0.999).tolist() == [2**64 - 3, 2**64 - 2]
    assert len(held_out_hashes(few[:1], np.zeros(1, np.int64), 0.5)) == 0
    spread = hashes[:200] | np.uint64(2**63)
    rare = np.repeat([0, 1], 100)  # each domain gets its share
    held = held_out_hashes(spread, rare, 0.05)
    assert [np.isin(spread[rare == d], held).sum() for d in (0, 1)] == [5, 5]


def test_duplicates_do_not_leak_into_training(tmp_path, cfg, tokenizer, texts):
    source = write(tmp_path / "a.jsonl", texts[:20] * 5)
    data = open_data(cfg(train=(source,), valid_fraction=0.2), tokenizer)
    assert len(data.valid) % 5 == 0
    assert len(data.valid) + data.train.num_documents == 100


def test_every_source_keeps_a_document(tmp_path, cfg, tokenizer):
    sources = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in sources:
        Path(name).write_text(name * 3)
    lines: list[str] = []
    data = open_data(cfg(train=tuple(sources), valid_fraction=0.5), tokenizer, log=lines.append)
    assert data.train.num_documents == 2 and len(data.valid) == 0
    assert "too few documents" in lines[-1]


def test_given_validation(tmp_path, two, cfg, tokenizer, texts):
    lines: list[str] = []
    data = open_data(cfg(train=two[:1], valid=two[1:], valid_fraction=0.5), tokenizer, log=lines.append)
    assert [d.text for d in data.valid] == texts[150:]
    assert data.train.num_documents == 150
    assert not any("warning" in line for line in lines)
    open_data(cfg(train=two, valid=two[1:]), tokenizer, log=lines.append)
    assert "50 training documents are also validation documents" in lines[-1]


def test_one_document_shorter_than_a_row(tmp_path, cfg, tokenizer):
    (tmp_path / "tiny.txt").write_text("the cat")
    train = open_data(cfg(train=(str(tmp_path / "tiny.txt"),), seq_len=50), tokenizer).train
    document = [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eos_id]
    batch = Loader(train, batch_size=2, seed=0).batch(3)
    line = document * 100
    begin = 6 * 50 % len(document)
    assert batch.tokens.ravel().tolist() == line[begin : begin + 100]
    assert int(batch.doc_ids.max()) >= 50 // len(document) - 1
    assert int(batch.positions.max()) == len(document) - 1


def test_no_documents(tmp_path, cfg, tokenizer):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(SidError, match=r"empty\.txt' holds no documents"):
        open_data(cfg(train=(str(empty),)), tokenizer)
    with pytest.raises(SidError, match="no text to train a tokenizer on"):
        prepare_tokenizer(cfg(train=(str(empty),)), tmp_path / "tok")
    with pytest.raises(SidError, match="'missing' does not exist"):
        open_data(cfg(train=("missing",)), tokenizer)

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sidlm.data import readers
from sidlm.data.readers import CorruptDataError
from sidlm.data.sources import Document, find_shards, iter_documents
from sidlm.errors import SidError

RECORDS = [{"text": f"document {i} é", "domain": "ab"[i % 2]} for i in range(50)]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


def read(source, cfg, **kwargs):
    return list(iter_documents(str(source), cfg(**kwargs)))


def expected():
    return [Document(r["text"], r["domain"]) for r in RECORDS]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl(tmp_path, cfg, suffix):
    file = tmp_path / f"shard{suffix}"
    half = len(LINES) // 2
    if suffix.endswith("zst"):  # two frames, as concatenated files have
        file.write_bytes(b"".join(zstandard.compress(part) for part in (LINES[:half], LINES[half:])))
    else:
        file.write_bytes(gzip.compress(LINES) if suffix.endswith("gz") else LINES)
    assert read(file, cfg) == expected()
    assert read(file, cfg, domain_key="none") == [Document(r["text"], "shard") for r in RECORDS]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_shard(tmp_path, cfg, suffix):
    noise = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(20_000))
    packed = gzip.compress(noise) if suffix.endswith("gz") else zstandard.compress(noise)
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CorruptDataError, match=r"bad\.jsonl\.(gz|zst) is damaged"):
        read(file, cfg)
    with pytest.warns(UserWarning, match=r"bad\.jsonl"):
        kept = read(file, cfg, skip_corrupt=True)
    assert 1000 < len(kept) < 20_000
    file.write_bytes(b"junk" * 100)
    with pytest.raises(CorruptDataError, match="is damaged"):
        read(file, cfg)


def test_bad_lines_name_file_and_line(tmp_path, cfg):
    file = tmp_path / "x.jsonl"
    for line, words in [
        (b"{nope", "line 3 is not valid JSON"),
        (b"[1]", "line 3 is not a JSON object but a list"),
        (b'{"text": null}', "line 3: 'text' is a NoneType"),
        (b'{"text": "\xff"}', "line 3 is not valid JSON"),
    ]:
        file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
        with pytest.raises(CorruptDataError, match=words):
            read(file, cfg)
        with pytest.warns(UserWarning, match="line 3"):
            assert read(file, cfg, skip_corrupt=True) == [Document("one", "x")]


def test_missing_key_names_the_keys(tmp_path, cfg):
    file = tmp_path / "x.jsonl"
    file.write_text('{"content": "one", "id": 1}\n')
    for skip in (False, True):  # a wrong setting, not damage
        with pytest.raises(SidError, match=r"x\.jsonl line 1 has no key 'text' .*keys are: content, id"):
            read(file, cfg, skip_corrupt=skip)
    assert read(file, cfg, text_key="content") == [Document("one", "x")]


def test_parquet(tmp_path, cfg):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), file)
    assert read(file, cfg) == expected()
    with pytest.raises(SidError, match=r"x\.parquet has no column 'body' .*it has domain, text"):
        read(file, cfg, text_key="body")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorruptDataError, match=r"x\.parquet is damaged"):
        read(file, cfg)
    with pytest.warns(UserWarning, match="damaged"):
        assert read(file, cfg, skip_corrupt=True) == []


def test_missing_optional_packages_are_named(tmp_path, cfg, monkeypatch):
    import sys

    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "x.jsonl.zst").write_bytes(b"")
    for name in ("pyarrow", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source, package in [("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")]:
        with pytest.raises(SidError, match=f"{source} needs {package}: pip install"):
            read(tmp_path / source, cfg)
    with pytest.raises(SidError, match="needs datasets: pip install datasets"):
        read("hf:org/absent-name", cfg)


def test_hugging_face_folder(tmp_path, cfg, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    data = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": data, "dev": data.select(range(3))}).save_to_disk(str(tmp_path / "saved"))
    assert read(f"hf:{tmp_path / 'saved'}", cfg) == expected()
    assert read(f"hf:{tmp_path / 'saved'}:dev", cfg) == expected()[:3]
    with pytest.raises(SidError, match="split 'nope'"):
        read(f"hf:{tmp_path / 'saved'}:nope", cfg)
    with pytest.raises(SidError, match="no column 'body'"):
        read(f"hf:{tmp_path / 'saved'}", cfg, text_key="body")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(LINES)
    assert read(f"hf:{tmp_path / 'files'}", cfg) == expected()


def test_folder_glob_and_order(tmp_path, cfg):
    for name in ("b/two.md", "a/one.txt", "z.py", ".hidden/x.txt", "b/image.png", "__pycache__/x.py"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in/c.jsonl").write_text('{"text": "json"}\n')
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    texts = [d.text for d in read(tmp_path / "in", cfg)]
    assert sorted(texts) == ["a/one.txt", "b/two.md", "json", "z.py"]
    assert {d.domain for d in read(tmp_path / "in", cfg)} == {"in"}
    assert [d.text for d in read(tmp_path / "in/*.py", cfg)] == ["z.py"]
    assert [d.text for d in read(tmp_path / "in/?", cfg)] == ["a/one.txt", "b/two.md"]
    assert [d.text for d in read(f"{tmp_path}/in/**/*.md=0.5", cfg)][:1] == ["b/two.md"]


def test_nothing_there(tmp_path, cfg):
    (tmp_path / "d").mkdir()
    with pytest.raises(SidError, match=r"d holds no text.*it is empty"):
        read(tmp_path / "d", cfg)
    (tmp_path / "d/x.png").touch()
    with pytest.raises(SidError, match=r"1 \.png"):
        read(tmp_path / "d", cfg)
    with pytest.raises(SidError, match="'nowhere' does not exist"):
        read("nowhere", cfg)
    with pytest.raises(SidError, match="no readable file matches"):
        read(tmp_path / "*.foo", cfg)


def test_text_file(tmp_path, cfg):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhello\r\nworld")
    assert read(file, cfg) == [Document("hello\r\nworld", "a")]
    file.write_bytes(b"ok \xff")
    with pytest.raises(CorruptDataError, match=r"a\.txt is not UTF-8 text: bad byte at 3"):
        read(file, cfg)
    file.write_bytes(b"x" * (readers.CHUNK_BYTES - 1) + "é".encode() + b"\xff")
    with pytest.raises(CorruptDataError, match=f"bad byte at {readers.CHUNK_BYTES + 1}"):
        read(file, cfg)


def test_long_text_file_is_cut(tmp_path, cfg):
    text = "".join(f"paragraph {i} é\n" + "\n" * (i % 3 == 0) for i in range(100_000))
    file = tmp_path / "long.txt"
    file.write_text(text)
    parts = [d.text for d in read(file, cfg)]
    assert "".join(parts) == text
    assert len(parts) > 10
    assert all(len(part) <= readers.PIECE_CHARS and part.endswith("\n\n") for part in parts[:-1])
    assert parts == readers.split_text(text)  # whatever the size of the chunks read


@given(st.text("ab\n"), st.integers(2, 9))
def test_split_text(text, limit):
    pieces = readers.split_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


@given(st.lists(st.binary()), st.integers(1, 7))
def test_lines_do_not_depend_on_chunks(lines, size):
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "read_chunks", lambda _: (content[i : i + size] for i in range(0, len(content), size)))
        got = [line for _, line in readers.read_lines(Path("any"))]
    want = content.split(b"\n")
    assert got == (want[:-1] if want[-1] == b"" else want)


def test_embedded(cfg):
    shards = find_shards("embedded", cfg())
    documents = [d for d in read("embedded", cfg)]
    assert {shard.domain for shard in shards} == {d.domain for d in documents} == {"code", "english"}
    assert documents == read("embedded", cfg)
    names = [p.name for p in shards[0].paths]
    assert "argparse.py" in names
    assert not any("test" in p.parts or "site-packages" in p.parts for p in shards[0].paths)
    assert sum(len(d.text) for d in documents) > 4_000_000

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest

import sidlm
from sidlm.data import cache
from sidlm.data.cache import TokenShard, load_shard, open_shard
from sidlm.data.readers import CorruptDataError
from sidlm.data.sources import find_shards
from sidlm.errors import SidError


def write(path: Path, texts, domains=("x", "y")) -> Path:
    rows = [{"text": text, "domain": domains[i % len(domains)]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, cfg, tokenizer, log=None, **kwargs) -> TokenShard:
    config = cfg(**kwargs)
    (shard,) = find_shards(str(path), config)
    return load_shard(shard, config, tokenizer, log=log)


def files(config) -> list[str]:
    return sorted(p.suffix for p in (config.cache_path / "tokens").iterdir())


def test_contents(tmp_path, cfg, tokenizer, texts):
    shard = load(write(tmp_path / "a.jsonl", [*texts, ""]), cfg, tokenizer)
    tokens = shard.map_tokens()
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable
    assert len(shard.ends) == len(texts)  # the empty one is no document
    begin = 0
    for i, text in enumerate(texts):
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert tokens[begin : shard.ends[i]].tolist() == ids
        assert shard.num_bytes[i] == len(text.encode())
        assert shard.hashes[i] == cache.text_hash(text)
        assert shard.domain_names[shard.domains[i]] == "xy"[i % 2]
        begin = int(shard.ends[i])
    assert begin == shard.num_tokens == len(tokens)


def test_large_vocabulary_takes_32_bits(tmp_path, cfg, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    assert load(write(tmp_path / "a.jsonl", texts), cfg, tokenizer).map_tokens().dtype == np.uint32


def test_text_hash_never_changes():
    assert cache.text_hash("naïve 🎉") == 17699714075207521986


def test_built_once_and_rebuilt_when_something_changed(tmp_path, cfg, tokenizer, texts):
    lines: list[str] = []
    path = write(tmp_path / "a.jsonl", texts)
    first = load(path, cfg, tokenizer, lines.append)
    second = load(path, cfg, tokenizer, lines.append)
    assert first.path == second.path
    assert len(lines) == 1 and "200 documents" in lines[0] and "a.jsonl" in lines[0]
    assert load(path, cfg, tokenizer, domain_key="other").path != first.path
    write(path, texts[:-1])
    assert len(load(path, cfg, tokenizer).ends) == len(texts) - 1


def test_a_damaged_cache_file_is_rebuilt(tmp_path, cfg, tokenizer, texts):
    path = write(tmp_path / "a.jsonl", texts)
    shard = load(path, cfg, tokenizer)
    good = shard.path.read_bytes()
    for bad in (good[:-5], good[:100], b"", b"x" * len(good), good[:-30] + b"\0" * 30, good + b"x"):
        shard.path.write_bytes(bad)
        with pytest.raises(SidError, match=shard.path.name):
            open_shard(shard.path)
        lines: list[str] = []
        assert load(path, cfg, tokenizer, lines.append).num_tokens == shard.num_tokens
        assert "rebuilding" in lines[0]
        assert shard.path.read_bytes() == good


def test_skipped_damage_is_remembered(tmp_path, cfg, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{oops\n')
    with pytest.raises(CorruptDataError, match=r"a\.jsonl line 2"):
        load(path, cfg, tokenizer)
    assert files(cfg()) == [".lock"]
    for _ in range(2):  # built, then found
        lines: list[str] = []
        assert len(load(path, cfg, tokenizer, lines.append, skip_corrupt=True).ends) == 1
        assert "warning" in lines[-1] and "a.jsonl line 2" in lines[-1]
    with pytest.raises(CorruptDataError, match=r"a\.jsonl line 2"):
        load(path, cfg, tokenizer)


WRITE = cache._write


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk(tmp_path, cfg, tokenizer, texts, monkeypatch, room):
    path = write(tmp_path / "a.jsonl", texts)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", lambda file, *args: WRITE(cast(IO[bytes], FullDisk(file, room)), *args))
        with pytest.raises(
            SidError, match=r"disk full .*cache/tokens: .*a\.jsonl needs about [\d,]+ bytes, [\d,]+ are free"
        ):
            load(path, cfg, tokenizer)
    assert files(cfg()) == [".lock"]
    assert len(load(path, cfg, tokenizer).ends) == len(texts)


def test_cache_folder_that_cannot_be_made(tmp_path, cfg, tokenizer, texts):
    (tmp_path / "file").touch()
    with pytest.raises(SidError, match=r"cannot use the data cache in .*file"):
        load(write(tmp_path / "a.jsonl", texts), cfg, tokenizer, cache_dir=str(tmp_path / "file"))


BUILD = """
    import contextlib, sys, time
    from sidlm.data import cache
    from sidlm.data.config import DataConfig
    from sidlm.data.sources import find_shards
    from sidlm.data.tokenizer import Tokenizer
    pattern, tokenizer, pause = sys.argv[1], Tokenizer.load(sys.argv[2]), float(sys.argv[3])
    cache.ENCODE_CHARS = 2000
    encode = Tokenizer.encode_batch
    def slow(self, texts):
        time.sleep(pause)
        return encode(self, texts)
    Tokenizer.encode_batch = slow
    if "no-lock" in sys.argv:
        cache.build_lock = lambda path, log: contextlib.nullcontext(False)
    cfg = DataConfig()
    for shard in find_shards(pattern, cfg):
        cache.load_shard(shard, cfg, tokenizer, log=lambda line: print(line, flush=True))
"""


def builder(tmp_path: Path, cache_dir: Path, pause: float, *options: str) -> subprocess.Popen:
    source = str(Path(sidlm.__file__).parents[1])
    env = {**os.environ, "SID_CACHE": str(cache_dir), "PYTHONPATH": source, "TOKENIZERS_PARALLELISM": "false"}
    arguments = [str(tmp_path / "*.jsonl"), str(tmp_path / "tok"), str(pause), *options]
    command = [sys.executable, "-c", textwrap.dedent(BUILD), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def finished(cache_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((cache_dir / "tokens").glob("*.sidtok"))}


def test_killed_while_building(tmp_path, tokenizer, texts):
    """SIGKILL in the middle of the second shard: the first stays, the rest is redone, all as if uninterrupted."""
    tokenizer.save(tmp_path / "tok")
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", [f"{i} {text}" for text in texts])
    process = builder(tmp_path, tmp_path / "cache", 0.05)
    assert process.stdout is not None
    process.stdout.readline()  # the first shard is done
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size for p in (tmp_path / "cache/tokens").glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    half = finished(tmp_path / "cache")
    assert len(half) == 1
    assert list((tmp_path / "cache/tokens").glob("*.tmp"))
    again = builder(tmp_path, tmp_path / "cache", 0)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "0.jsonl" not in output and "1.jsonl" in output and "2.jsonl" in output
    assert builder(tmp_path, tmp_path / "straight", 0).wait(60) == 0
    assert finished(tmp_path / "cache") == finished(tmp_path / "straight")
    assert len(finished(tmp_path / "cache")) == 3
    assert not list((tmp_path / "cache/tokens").glob("*.tmp"))


def test_two_builders_at_once(tmp_path, tokenizer, texts):
    tokenizer.save(tmp_path / "tok")
    write(tmp_path / "0.jsonl", texts)
    processes = [builder(tmp_path, tmp_path / "cache", 0.1) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("tokenised" in output for output in outputs) == 1  # the other waited
    assert len(finished(tmp_path / "cache")) == 1


def test_two_builders_without_locks(tmp_path, cfg, tokenizer, texts):
    """File systems without locks: work is done twice, the result is whole."""
    tokenizer.save(tmp_path / "tok")
    write(tmp_path / "0.jsonl", texts)
    processes = [builder(tmp_path, tmp_path / "cache", 0.2, "no-lock") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("tokenised" in output for output in outputs) == 2
    assert files(cfg()) == [".sidtok"]
    lines: list[str] = []
    assert len(load(tmp_path / "*.jsonl", cfg, tokenizer, lines.append).ends) == len(texts)
    assert lines == []

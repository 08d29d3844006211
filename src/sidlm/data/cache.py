"""Tokenised shards on disk: one memory-mapped file each, written once, never half.

File: 64-byte header (magic, footer offset and length), tokens (uint16 or uint32), then per document its end in tokens,
the hash of its text, the text's UTF-8 bytes and its domain index, then a JSON footer. All little-endian. A file appears
under its final name only complete and synced, so an interrupted build costs the unfinished shards and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sidlm.data.config import DataConfig
from sidlm.data.readers import CorruptDataError
from sidlm.data.sources import Document, Shard, iter_shard
from sidlm.data.tokenizer import Tokenizer, clean
from sidlm.errors import SidError

MAGIC = b"SIDTOK\x00\x01"
HEADER_BYTES = 64
ENCODE_CHARS = 4 << 20  # text handed to the tokenizer at a time
REPORT_SECONDS = 10.0
SECTIONS = {"ends": "<i8", "hashes": "<u8", "num_bytes": "<i8", "domains": "<i4"}
Log = Callable[[str], None]


@dataclass(frozen=True)
class TokenShard:
    """A tokenised shard. `ends[i]` is the end of document i in tokens; `domains[i]` indexes `domain_names`."""

    path: Path
    dtype: np.dtype
    num_tokens: int
    ends: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    num_bytes: NDArray[np.int64]
    domains: NDArray[np.int32]
    domain_names: tuple[str, ...]
    corrupt: tuple[str, ...]

    def map_tokens(self) -> NDArray[np.integer]:
        """The tokens (num_tokens,), memory-mapped read-only."""
        if self.num_tokens == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.num_tokens,))


def text_hash(text: str) -> int:
    """64-bit hash of a text that never changes between machines, versions and runs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def load_shard(shard: Shard, cfg: DataConfig, tokenizer: Tokenizer, *, log: Log | None = None) -> TokenShard:
    """The tokenised shard, from the cache or built into it.

    Several processes may ask at once: one builds, the others wait. Raises SidError for unreadable or (without
    cfg.skip_corrupt) damaged input, and for a cache folder that is full or not writable, naming the bytes.
    """
    log = log or (lambda _: None)
    identity = json.dumps([2, tokenizer.fingerprint, tokenizer.vocab_size, shard.identity(cfg)], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = cfg.cache_path / "tokens"
    final = folder / f"{key}.sidtok"
    with _cache_errors(folder):
        found = _open_or_none(final, log)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with build_lock(folder / f"{key}.lock", log) as locked:
                found = _open_or_none(final, log)  # somebody may have built it while we waited
                if found is None:
                    if locked:  # then any temporary file of this key was left by a killed process
                        for stale in folder.glob(f"{key}.*.tmp"):
                            stale.unlink(missing_ok=True)
                    _build(final, shard, cfg, tokenizer, log)
                    found = open_shard(final)
    for message in found.corrupt:
        if not cfg.skip_corrupt:
            raise CorruptDataError(message)
        log(f"warning: skipped the rest of a damaged file: {message}")
    return found


def open_shard(path: Path) -> TokenShard:
    """Read a cache file's document tables. Raises FileNotFoundError, or SidError for an incomplete one."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
        if len(header) < HEADER_BYTES or header[:8] != MAGIC:
            raise SidError(f"{path} is not a Sid token file")
        start, length = struct.unpack("<QQ", header[8:24])
        if start + length != size:
            raise SidError(f"{path} has {size} bytes, its header says {start + length}")
        file.seek(start)
        try:
            footer = json.loads(file.read(length))
            tables = {}
            for name, kind in SECTIONS.items():
                file.seek(footer["sections"][name])
                tables[name] = np.fromfile(file, dtype=kind, count=footer["num_documents"])
        except (ValueError, KeyError, TypeError) as error:
            raise SidError(f"{path} has a damaged footer: {error}") from error
    if any(len(table) != footer["num_documents"] for table in tables.values()):
        raise SidError(f"{path} has short document tables")
    return TokenShard(
        path=path,
        dtype=np.dtype(footer["dtype"]),
        num_tokens=footer["num_tokens"],
        domain_names=tuple(footer["domains"]),
        corrupt=tuple(footer["corrupt"]),
        **tables,
    )


@contextlib.contextmanager
def build_lock(path: Path, log: Log) -> Iterator[bool]:
    """Hold the file's lock, which a dying process loses. Yields False where the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows: builders may then repeat each other's work, never damage it
        yield False
        return
    with path.open("a") as file:
        locked = True
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("waiting for another process that is preparing the same data")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


def _open_or_none(path: Path, log: Log) -> TokenShard | None:
    try:
        return open_shard(path)
    except FileNotFoundError:
        return None
    except SidError as error:
        log(f"warning: {error}; rebuilding it")
        return None


def _build(final: Path, shard: Shard, cfg: DataConfig, tokenizer: Tokenizer, log: Log) -> None:
    temporary = final.with_name(f"{final.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    corrupt: list[str] = []
    try:
        with temporary.open("wb") as file:
            documents = iter_shard(shard, cfg, on_corrupt=corrupt.append)
            num_documents, num_tokens = _write(file, documents, corrupt, tokenizer, shard.name, log)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SidError(_disk_full(final.parent, shard, written, _token_dtype(tokenizer).itemsize)) from error
        raise
    log(f"tokenised {shard.name}: {num_documents:,} documents, {num_tokens:,} tokens")


def _write(
    file: IO[bytes], documents: Iterable[Document], corrupt: list[str], tokenizer: Tokenizer, name: str, log: Log
) -> tuple[int, int]:
    dtype = _token_dtype(tokenizer)
    columns: dict[str, list[NDArray]] = {key: [] for key in SECTIONS}
    domains: dict[str, int] = {}
    total, last = 0, time.monotonic()
    file.write(bytes(HEADER_BYTES))
    for chunk in _chunks(documents):
        texts = [clean(document.text) for document in chunk]
        ids = [[tokenizer.bos_id, *tokens, tokenizer.eos_id] for tokens in tokenizer.encode_batch(texts)]
        flat = np.concatenate([np.asarray(tokens, dtype=dtype) for tokens in ids])
        file.write(flat.tobytes())
        columns["ends"].append(total + np.cumsum([len(tokens) for tokens in ids], dtype="<i8"))
        columns["hashes"].append(np.array([text_hash(text) for text in texts], dtype="<u8"))
        columns["num_bytes"].append(np.array([len(text.encode()) for text in texts], dtype="<i8"))
        columns["domains"].append(np.array([domains.setdefault(d.domain, len(domains)) for d in chunk], dtype="<i4"))
        total += len(flat)
        if time.monotonic() - last > REPORT_SECONDS:  # a long shard must not look like a hang
            last = time.monotonic()
            log(f"tokenising {name}: {total:,} tokens so far")
    sections = {}
    file.write(bytes(-file.tell() % 8))
    for key, kind in SECTIONS.items():
        sections[key] = file.tell()
        file.write(np.concatenate([np.empty(0, kind), *columns[key]]).astype(kind).tobytes())
    footer = {
        "dtype": dtype.str,
        "num_tokens": total,
        "num_documents": sum(len(column) for column in columns["ends"]),
        "sections": sections,
        "domains": list(domains),
        "corrupt": corrupt,
        "source": name,
    }
    payload = json.dumps(footer).encode()
    start = file.tell()
    file.write(payload)
    file.seek(0)
    file.write(MAGIC + struct.pack("<QQ", start, len(payload)))
    return footer["num_documents"], total


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text)
        if chars >= ENCODE_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _sync_folder(folder: Path) -> None:
    # makes the rename itself survive a power cut
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SidError(f"cannot use the data cache in {folder}: {error.strerror or error}") from error


def _disk_full(folder: Path, shard: Shard, written: int, itemsize: int) -> str:
    # about 3 bytes of text a token; compressed text is about 4 times smaller than the text
    packed = sum(path.stat().st_size * (4 if path.suffix in (".zst", ".gz", ".parquet") else 1) for path in shard.paths)
    needed = max(packed * itemsize // 3, written)
    free = shutil.disk_usage(folder).free
    return (
        f"disk full while writing the data cache in {folder}: {shard.name} needs about {needed:,} bytes, "
        f"{free:,} are free; free some space or set data.cache_dir"
    )

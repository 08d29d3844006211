"""Bytes and records out of data files, with errors that name the file and the line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.config import DataConfig

CHUNK_BYTES = 1 << 20
SPLIT_ABOVE = 1 << 16  # a plain text file of more characters than this is cut, so that a book alone can hold some out
PIECE_CHARS = 1 << 16  # into documents of at most this many


class CorruptDataError(SidError):
    """A damaged input file; the rest of it can be skipped."""


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content, decompressed by suffix (.gz, .zst). Raises CorruptDataError when damaged or truncated."""
    try:
        if path.suffix == ".zst":
            yield from _read_zstd(path)
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                while chunk := file.read1(CHUNK_BYTES):  # read() would lose what precedes damage
                    yield chunk
        else:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptDataError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise SidError(f"cannot read {path}: {error.strerror or error}") from error


def _read_zstd(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise SidError(f"reading {path} needs zstandard: pip install zstandard") from error
    # not stream_reader: it takes a truncated file for a complete one
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what zstd --long=31 writes
    frame = None
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES // 8):
            while data:
                frame = frame or decoder.decompressobj()
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise CorruptDataError(f"{path} is damaged: {error}") from error
                if chunk:
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise CorruptDataError(f"{path} is damaged: it ends in the middle of a zstd frame")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a possibly compressed file with their numbers, from 1."""
    number, rest = 0, b""
    for chunk in read_chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, line
    if rest:
        yield number + 1, rest


def read_text(path: Path) -> Iterator[str]:
    """The text file as one document, or several when long; joined they are the file without byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0

    def decode(chunk: bytes, final: bool = False) -> str:
        nonlocal done
        begin = done - len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise CorruptDataError(f"{path} is not UTF-8 text: bad byte at {begin + error.start}") from error
        done += len(chunk)
        return text.removeprefix("\ufeff") if begin == 0 else text

    buffer, cutting = "", False
    for chunk in read_chunks(path):
        buffer += decode(chunk)
        cutting = cutting or len(buffer) > SPLIT_ABOVE
        if cutting:
            *pieces, buffer = split_text(buffer)
            yield from pieces
    buffer += decode(b"", True)
    if cutting or len(buffer) > SPLIT_ABOVE:
        yield from split_text(buffer)
    else:
        yield buffer


def split_text(text: str, limit: int = PIECE_CHARS) -> list[str]:
    """Pieces within limit, cut at a blank line, else a line end, else anywhere; joined they are the text."""
    pieces, start = [], 0
    while len(text) - start > limit:
        end = start + limit
        cut = text.rfind("\n\n", start + 1, end) + 2
        if cut <= start + limit // 2:
            cut = text.rfind("\n", start + 1, end) + 1
        if cut <= start + limit // 2:
            cut = end
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def read_jsonl(path: Path, cfg: DataConfig) -> Iterator[tuple[str, str | None]]:
    """(text, domain or None) of each line that is not blank."""
    for number, line in read_lines(path):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorruptDataError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorruptDataError(f"{where} is not a JSON object but a {type(record).__name__}")
        yield _text_and_domain(record, cfg, where)


def read_parquet(path: Path, cfg: DataConfig) -> Iterator[tuple[str, str | None]]:
    """(text, domain or None) of each row."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SidError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(names, cfg, str(path))
            columns = [name for name in (cfg.text_key, cfg.domain_key) if name in names]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield _text_and_domain(record, cfg, f"{path} row {row}")
    except (pa.ArrowException, OSError) as error:  # ArrowInvalid for a bad footer, OSError for a bad page
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptDataError(f"{path} is damaged after row {row}: {message}") from error


def read_dataset(dataset: Any, cfg: DataConfig, name: str) -> Iterator[tuple[str, str | None]]:
    """(text, domain or None) of each row of a `datasets.Dataset`."""
    names = dataset.column_names
    check_columns(names, cfg, name)
    dataset = dataset.select_columns([key for key in dict.fromkeys((cfg.text_key, cfg.domain_key)) if key in names])
    row = 0
    for batch in dataset.iter(batch_size=1024):
        keys = list(batch)
        for values in zip(*(batch[key] for key in keys), strict=True):
            row += 1
            yield _text_and_domain(dict(zip(keys, values, strict=True)), cfg, f"{name} row {row}")


def check_columns(names: list[str], cfg: DataConfig, where: str) -> None:
    """Raise SidError unless the text column is there."""
    if cfg.text_key not in names:
        raise SidError(f"{where} has no column {cfg.text_key!r} (data.text_key); it has {', '.join(sorted(names))}")


def _text_and_domain(record: dict[str, Any], cfg: DataConfig, where: str) -> tuple[str, str | None]:
    if cfg.text_key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise SidError(f"{where} has no key {cfg.text_key!r} (data.text_key); its keys are: {keys}")
    text = record[cfg.text_key]
    if not isinstance(text, str):
        raise CorruptDataError(f"{where}: {cfg.text_key!r} is a {type(text).__name__}, not a string")
    domain = record.get(cfg.domain_key)
    return text, None if domain is None else str(domain)

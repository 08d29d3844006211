"""From a source on the command line to documents: finding files, grouping them into shards, reading them."""

from __future__ import annotations

import functools
import glob
import platform
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidlm.data import readers
from sidlm.data.config import DataConfig, parse_source
from sidlm.data.readers import CorruptDataError
from sidlm.errors import SidError

# what a folder is searched for; a file named outright is read as text whatever its suffix
_TEXT = """.txt .text .md .markdown .rst .tex .org .adoc .html .css .py .pyi .pyx .c .h .cc .cpp .hpp .cu .cuh .rs .go
    .java .kt .scala .js .mjs .ts .jsx .tsx .rb .php .pl .lua .jl .r .swift .cs .hs .ml .clj .ex .erl .lean .v .sv
    .vhdl .f90 .f .sql .sh .bash .zsh .ps1 .el .lisp .scm .proto .zig .nim .d .m"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
GROUP_BYTES = 32 << 20  # small text files are tokenised and cached together up to this size
SKIP = frozenset({"__pycache__", "node_modules"})
# bulk of the standard library that is not everyday code: tests, encoding tables, generated and vendored files
_BULK = """site-packages dist-packages test tests idle_test idlelib lib2to3 __pycache__ encodings turtledemo pydoc_data
    ensurepip distutils lib-dynload __phello__"""
EMBEDDED_SKIP = frozenset(_BULK.split())


@dataclass(frozen=True)
class Document:
    """One text and the domain it belongs to."""

    text: str
    domain: str


@dataclass(frozen=True)
class Shard:
    """A unit of reading and caching: one data file, or a group of small text files."""

    kind: Literal["text", "jsonl", "parquet", "hf", "topics"]
    domain: str
    name: str
    paths: tuple[Path, ...] = ()
    dataset: tuple[str, str | None, str] = ("", None, "")

    def identity(self, cfg: DataConfig) -> list[Any]:
        """JSON-able value that changes when the documents may have: paths, sizes, times, keys. Raises SidError."""
        files = []
        for path in self.paths:
            try:
                stat = path.stat()
            except OSError as error:
                raise SidError(f"cannot read {path}: {error.strerror or error}") from error
            files.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
        keys = [cfg.text_key, cfg.domain_key] if self.kind in ("jsonl", "parquet", "hf") else []
        version: list[Any] = []
        if self.kind == "topics":
            version = [platform.python_implementation(), *sys.version_info]
        elif self.kind == "hf":
            dataset = _load_hf(*self.dataset)
            version = [*self.dataset, len(dataset), getattr(dataset, "_fingerprint", "")]
        return [self.kind, self.domain, files, keys, version]


def iter_documents(
    source: str, cfg: DataConfig, *, on_corrupt: Callable[[str], None] | None = None
) -> Iterator[Document]:
    """Documents of `PATH` or `PATH=WEIGHT` in a fixed order. See `iter_shard` for errors."""
    for shard in find_shards(source, cfg):
        yield from iter_shard(shard, cfg, on_corrupt=on_corrupt)


def find_shards(source: str, cfg: DataConfig) -> list[Shard]:
    """The shards of a source in a fixed order. Raises SidError when it does not exist or holds nothing readable."""
    location = parse_source(source).location
    if location == "embedded":
        return _embedded_shards()
    if location.startswith("hf:"):
        return [_hf_shard(location)]
    path = Path(location).expanduser()
    if path.is_dir():
        files = _readable(path)
        if not files:
            suffixes = Counter(p.suffix or "(no suffix)" for p in _walk(path))
            found = ", ".join(f"{n} {s}" for s, n in suffixes.most_common(5)) or "it is empty"
            raise SidError(f"folder {path} holds no text, .jsonl or .parquet file ({found})")
        return _group(files, path.absolute().name or "root")
    if path.is_file():
        return _group([path], path.name.split(".")[0] or path.name)
    if glob.has_magic(location):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [p for p in found if p.is_file()]
        if "**" not in location:
            files += [p for folder in found if folder.is_dir() for p in _readable(folder)]
        if not files:
            raise SidError(f"data source {location!r}: no readable file matches this pattern")
        return _group(files, files[0].absolute().parent.name or "root")
    raise SidError(f"data source {location!r} does not exist (a file, folder, glob, hf:NAME or 'embedded' is expected)")


def iter_shard(shard: Shard, cfg: DataConfig, *, on_corrupt: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Documents of a shard that are not empty.

    A damaged file raises CorruptDataError (a SidError) naming file and line; with cfg.skip_corrupt its rest is skipped
    and on_corrupt (default: warnings.warn) gets the message. A missing text key or an unreadable file is always an
    error.
    """
    report = on_corrupt or (lambda message: warnings.warn(f"skipped the rest: {message}", stacklevel=2))
    for path in shard.paths or (Path(shard.name),):
        try:
            for text, domain in _records(shard, path, cfg):
                if text:
                    yield Document(text, domain or shard.domain)
        except CorruptDataError as error:
            if not cfg.skip_corrupt:
                raise
            report(str(error))


def _records(shard: Shard, path: Path, cfg: DataConfig) -> Iterator[tuple[str, str | None]]:
    if shard.kind == "jsonl":
        return readers.read_jsonl(path, cfg)
    if shard.kind == "parquet":
        return readers.read_parquet(path, cfg)
    if shard.kind == "hf":
        return readers.read_dataset(_load_hf(*shard.dataset), cfg, shard.name)
    if shard.kind == "topics":
        return ((text, None) for text in _python_topics())
    return ((text, None) for text in readers.read_text(path))


def _kind(path: Path) -> Literal["text", "jsonl", "parquet"]:
    if path.name.lower().endswith(JSONL_SUFFIXES):
        return "jsonl"
    return "parquet" if path.suffix.lower() == ".parquet" else "text"


def _text_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in (".gz", ".zst") else suffix


def _walk(folder: Path, skip: frozenset[str] = SKIP, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below the folder in sorted order, without hidden and skipped names; links are followed, not in circles."""
    try:
        entries = sorted(folder.iterdir(), key=lambda p: p.name)
        above = above | {folder.resolve()}
    except OSError as error:
        raise SidError(f"cannot read folder {folder}: {error.strerror or error}") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in skip:
            continue
        if entry.is_dir():
            if not entry.is_symlink() or entry.resolve() not in above:
                yield from _walk(entry, skip, above)
        elif entry.is_file():
            yield entry


def _readable(folder: Path) -> list[Path]:
    return [path for path in _walk(folder) if _kind(path) != "text" or _text_suffix(path) in TEXT_SUFFIXES]


def _group(files: Sequence[Path], domain: str) -> list[Shard]:
    shards: list[Shard] = []
    texts: list[Path] = []
    size = 0

    def flush() -> None:
        if texts:
            name = str(texts[0]) if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
            shards.append(Shard("text", domain, name, tuple(texts)))
            texts.clear()

    for path in files:
        kind = _kind(path)
        if kind != "text":
            shards.append(Shard(kind, domain, str(path), (path,)))
            continue
        if texts and size + path.stat().st_size > GROUP_BYTES:
            flush()
            size = 0
        texts.append(path)
        size += path.stat().st_size
    flush()
    return shards


def _embedded_shards() -> list[Shard]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    if root.is_dir():
        files = [
            p
            for p in _walk(root, EMBEDDED_SKIP)
            if p.suffix == ".py" and not p.name.startswith("_sysconfigdata") and _is_utf8(p)
        ]
    if not files:
        raise SidError(
            f"data source 'embedded': this Python has no library sources at {root}; name files of your own instead"
        )
    shards = [Shard("text", "code", f"Python {platform.python_version()} library ({len(files)} files)", tuple(files))]
    if _python_topics():
        shards.append(Shard("topics", "english", "Python language reference"))
    return shards


def _is_utf8(path: Path) -> bool:
    # a handful of library files declare another encoding
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _python_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without its documentation
        return []
    return [topics[name] for name in sorted(topics)]


def _hf_shard(location: str) -> Shard:
    name = location.removeprefix("hf:")
    head, colon, split = name.rpartition(":")
    name, split = (head, split) if colon and not Path(name).is_dir() else (name, "train")
    config = None
    if not Path(name).is_dir():
        name, _, config = name.partition("@")
    if not name or not split:
        raise SidError(f"data source {location!r}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME@CONFIG:SPLIT")
    key = (name, config or None, split)
    _load_hf(*key)
    return Shard("hf", Path(name).name, location, (), key)


@functools.lru_cache(maxsize=8)
def _load_hf(name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SidError(f"data source 'hf:{name}' needs datasets: pip install datasets") from error
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SidError(f"cannot load data set {name!r} split {split!r}: {reason}") from error

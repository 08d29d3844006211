"""Checkpoints for resuming: tensors through torch.distributed.checkpoint, everything else in one JSON file.

    checkpoints/step-00001000/tensors/   DCP files: model and optimizer tensors, nothing else
    checkpoints/step-00001000/state.json step, tokens, config, code version; size and SHA-256 of each tensor file

A checkpoint is written in a temporary folder beside its place, flushed to the disk and then renamed, so a folder of
the final name is complete at any moment of a crash. Nothing is unpickled freely: DCP keeps its index as a pickle,
which is read with an unpickler that knows only the few classes of that index.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sidlm.errors import SidError

FORMAT = 1
_TEMPORARY = ".tmp-"
ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"
"""What DCP warns of where there is one process"""
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and its state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]


# ---- writing: see saving.py ----


@contextlib.contextmanager
def replacing(target: Path, need: int) -> Iterator[Path]:
    """A new temporary folder that takes the place of `target` when the body ends well, and vanishes when it fails.

    need: bytes the body is about to write. Raises SidError with the folder, the needed and the free bytes when they
    do not fit, at once or half way.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise _disk_full(target, need, free)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _flush_folder(temporary)
        _put_in_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error) and not isinstance(error, SidError):
            raise _disk_full(target, need, shutil.disk_usage(target.parent).free) from error
        if isinstance(error, CheckpointException):  # not an Exception: give callers one they can catch
            reason = "; ".join(str(failure) for failure, _ in error.failures.values())
            raise SidError(f"could not write {target}: {reason}") from error
        raise


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; a folder of that name (a damaged checkpoint, an older export) is set aside first and then deleted."""
    aside = target.parent / f"{_TEMPORARY}old-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    _flush_folder(target.parent, deep=False)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half written; an old folder set aside by one gets its name back."""
    for path in sorted(folder.glob(f"{_TEMPORARY}*")) if folder.is_dir() else ():
        name = path.name.removeprefix(_TEMPORARY)
        if name.startswith("old-") and not (folder / name.removeprefix("old-")).exists():
            path.rename(folder / name.removeprefix("old-"))
        else:
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """Delete a checkpoint folder: renamed first, so that a kill half way leaves no half folder of a final name."""
    doomed = path.with_name(f"{_TEMPORARY}deleted-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def seal(path: Path, root: Path) -> dict[str, Any]:
    """A file's entry in state.json."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON with its own SHA-256 as the last key."""
    text = json.dumps(value, indent=1, allow_nan=False)
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    path.write_text(text[:-2] + f',\n "sha256": "{digest}"\n}}\n', encoding="utf-8")


def _flush_folder(folder: Path, *, deep: bool = True) -> None:
    """fsync a folder (and, if deep, everything in it), so that a rename after it never shows unwritten files."""
    for path in [*(sorted(folder.rglob("*")) if deep else ()), folder]:
        if os.name == "nt" and path.is_dir():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what DCP or safetensors made of it, says that the disk is full."""
    if isinstance(error, CheckpointException):
        return any(is_disk_full(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if error is not None and "No space left on device" in str(error):  # safetensors has only the text
        return True
    return error is not None and error.__cause__ is not None and is_disk_full(error.__cause__)


def _disk_full(target: Path, need: int, free: int) -> SidError:
    return SidError(
        f"no disk space for {target.name} in {target.parent}: needs {need:,} bytes, "
        f"{free:,} free; what was there is intact"
    )


# ---- finding and reading ----


def newest_good(folder: Path, *, warn: Any = warnings.warn) -> Checkpoint | None:
    """The newest checkpoint whose files have the recorded sizes and checksums, or None.

    Damaged ones are passed over with warn("<checkpoint>: <why>, trying the one before").
    """
    for _, path in numbered(folder):
        try:
            return open_checkpoint(path)
        except SidError as error:
            warn(f"skipping a damaged checkpoint: {error}; trying the one before")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read state.json and compare every file with it. Raises SidError naming the folder, the file and the numbers."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digest = state.pop("sha256")
        if hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest() != digest:
            raise ValueError("its checksum differs")
        if state["format"] != FORMAT:
            raise SidError(f"{path}: format {state['format']} is unknown, this version reads {FORMAT}")
        files, step = state["files"], state["step"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SidError(f"{path}: state.json is unreadable ({error})") from error
    if path.name != f"step-{step:08d}":
        raise SidError(f"{path}: state.json is of step {step}")
    with ThreadPoolExecutor(8) as pool:  # reading and hashing leave the interpreter free
        for problem in pool.map(lambda entry: _damage(path, entry), files):
            if problem:
                raise SidError(f"{path}: {problem}")
    return Checkpoint(path, state)


def _damage(root: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that state.json names."""
    file = root / entry["path"]
    if not file.is_file():
        return f"{entry['path']} is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{entry['path']} has {file.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    if seal(file, root)["sha256"] != entry["sha256"]:
        return f"{entry['path']} has another SHA-256 than recorded"
    return None


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Copy the checkpoint's values into `tensors`, in place.

    Raises SidError naming the first tensor that is missing, unexpected or of another shape or dtype; nothing is
    changed then.
    """
    reader = SafeReader(checkpoint.path / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    for name in sorted(_names_of_all(tensors) ^ stored.keys()):
        where = "is not in this model" if name in stored else "is missing"
        raise SidError(f"{checkpoint.path}: {name} {where}: the checkpoint is of another model")
    for name, tensor in tensors.items():
        found = stored[name]
        if not isinstance(found, TensorStorageMetadata):
            raise SidError(f"{checkpoint.path}: {name} is not a tensor")
        if (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            raise SidError(
                f"{checkpoint.path}: {name} is {tuple(found.size)} {_dtype(found.properties.dtype)} in the checkpoint "
                f"and {tuple(tensor.shape)} {_dtype(tensor.dtype)} in the model"
            )
    with quiet_single_process():
        dcp.load({name: t.detach() for name, t in tensors.items()}, storage_reader=reader)


def _names_of_all(tensors: dict[str, Tensor]) -> set[str]:
    """The names that any process has: of a model in pipeline stages each has some."""
    if not dist.is_initialized():
        return set(tensors)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(tensors))
    return set().union(*names)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with an index that is read by a restricted unpickler and names only files in its own folder."""

    index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read once. Raises SidError where it holds anything but the index's own classes."""
        if self.index is None:
            self.index = self._read_index(Path(self._get_metadata_path(kwargs.get("rank"))))
        assert self.index.storage_meta is not None
        self.index.storage_meta.load_id = self.load_id
        return self.index

    def _read_index(self, path: Path) -> Metadata:
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise SidError(f"{path}: not a checkpoint index ({error})") from error
        if not isinstance(index, Metadata):
            raise SidError(f"{path}: not a checkpoint index")
        for info in (index.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise SidError(f"{path}: refers to {info.relative_path!r} outside the checkpoint")
        index.storage_meta = index.storage_meta or dcp.metadata.StorageMeta()
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Admits the classes of DCP's index by exact name; everything else is refused before it is imported."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d{8,})", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


@contextlib.contextmanager
def quiet_single_process() -> Iterator[None]:
    """Without DCP's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield

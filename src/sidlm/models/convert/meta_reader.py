"""A checkpoint in Meta's layout, read layer by layer from memory-mapped files."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.convert import meta_layout
from sidlm.models.convert.source import Entry, check_tensors, expected_tensors, one_line, read_json


class MetaCheckpoint:
    """consolidated.NN.pth and params.json as a Checkpoint; `whole` gives the tensors in Meta's own convention.

    rope_factor: see `meta_layout.config_of`. Key/value heads that are repeated on neighbouring ranks are read once.
    Raises SidError for files that are missing, cut short, hold anything but tensors, or do not fit together.
    """

    def __init__(self, folder: Path, rope_factor: float | None = None) -> None:
        self.folder = folder
        self._paths = _rank_files(folder)
        for path in self._paths:
            _check_storages(path)
        self._group = ""
        self._open: list[dict[str, Tensor]] = []
        params = folder / "params.json"
        if not params.is_file():
            raise SidError(f"no params.json in {folder}")
        self.params = read_json(params)
        self.shapes = self._whole_shapes()
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.wk.weight"):
            if name not in self.shapes:
                raise SidError(f"{folder}: {name} is missing")
        self.config = meta_layout.config_of(
            self.params, str(params), shapes=self.shapes, tied=self._tied(), rope_factor=rope_factor
        )
        self.repeats = self._kv_repeats()
        dtype = self._files("")[0]["tok_embeddings.weight"].dtype
        self.tensors = {name: Entry(self._shape(name), dtype) for name in self._names()}
        check_tensors(folder, self.config, self.tensors)

    def read(self, name: str) -> Tensor:
        part = meta_layout.part_of(name)
        weight = self.whole(part.name)
        if part.heads == "kv" and self.repeats > 1:
            weight = self._once(part.name, weight)
        if part.rotary:
            weight = meta_layout.to_halves(weight, weight.shape[0] // self._head_dim)
        return weight

    def whole(self, name: str) -> Tensor:
        """The tensor with Meta's name, joined over the ranks, with repeated heads and neighbouring rotary pairs."""
        pieces = [file[name] for file in self._files(name)]
        cut = self._cut(name, pieces[0])
        if cut is None:
            if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
                raise SidError(f"{self.folder}: {name} must be the same on all {len(pieces)} ranks, but is not")
            return pieces[0]
        return torch.cat(pieces, dim=cut) if len(pieces) > 1 else pieces[0]

    @property
    def _head_dim(self) -> int:
        assert self.config.head_dim is not None
        return self.config.head_dim

    def _files(self, name: str) -> list[dict[str, Tensor]]:
        """The ranks' tensors, mapped anew for each layer: what was read stays in memory until its mapping goes."""
        layer = re.match(r"layers\.\d+\.", name)
        group = layer[0] if layer else name
        if not self._open or group != self._group:
            self._open = []
            self._open = [_load(path) for path in self._paths]
            self._group = group
        return self._open

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes joined over the ranks. Raises SidError where ranks disagree on names, shapes or dtypes."""
        first, *others = self._files("")
        for rank, file in enumerate(others, start=1):
            if file.keys() != first.keys():
                name = min(file.keys() ^ first.keys())
                raise SidError(f"{self.folder}: {name} is not on all of the ranks 0 and {rank}")
        shapes = {}
        for name, tensor in first.items():
            for rank, file in enumerate(others, start=1):
                if (file[name].shape, file[name].dtype) != (tensor.shape, tensor.dtype):
                    raise SidError(
                        f"{self.folder}: {name} is {tuple(tensor.shape)} {tensor.dtype} on rank 0, but "
                        f"{tuple(file[name].shape)} {file[name].dtype} on rank {rank}"
                    )
            shape, cut = list(tensor.shape), self._cut(name, tensor)
            if cut is not None:
                shape[cut] *= len(self._paths)
            shapes[name] = tuple(shape)
        return shapes

    def _cut(self, name: str, piece: Tensor) -> int | None:
        """The dimension along which the ranks cut a tensor, None for one that each of them has whole."""
        part = meta_layout.PARTS.get(re.sub(r"^layers\.\d+\.", "", name))
        if part is None or part.cut == "whole" or piece.ndim != 2:
            return None
        if name == "tok_embeddings.weight" and piece.shape[1] != self.params.get("dim"):
            return 1  # Llama 2 cut the embedding along its width
        return 0 if part.cut == "rows" else 1

    def _tied(self) -> bool:
        """No head of its own, or one that is the embedding again."""
        if "output.weight" not in self.shapes:
            return True
        files = self._files("")
        return all(torch.equal(file["output.weight"], file["tok_embeddings.weight"]) for file in files)

    def _kv_repeats(self) -> int:
        """How often each key/value head is repeated on neighbouring ranks; the config then counts the others only."""
        rows, dim = self.shapes["layers.0.attention.wk.weight"][0], self._head_dim
        if rows % dim:
            raise SidError(f"{self.folder}: wk has {rows} rows, no multiple of head_dim {dim}")
        heads, counted = rows // dim, self.config.num_key_value_heads
        assert counted is not None
        per_rank = heads // len(self._paths)
        keys = [self.whole(f"layers.0.attention.{w}.weight").view(heads, dim, -1) for w in ("wk", "wv")]
        repeats = 1
        while per_rank == 1 and heads % (2 * repeats) == 0 and all(_repeated(x, 2 * repeats) for x in keys):
            repeats *= 2
        if heads not in (counted, counted * repeats):
            raise SidError(
                f"{self.folder}: wk has {heads} heads on {len(self._paths)} ranks, but n_kv_heads is {counted}"
            )
        self.config.num_key_value_heads = heads // repeats
        return repeats

    def _once(self, name: str, weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (-1, self._head_dim))
        if not _repeated(heads, self.repeats):
            raise SidError(f"{self.folder}: {name} does not repeat its heads as those of layer 0 are repeated")
        return heads[:: self.repeats].flatten(0, 1)

    def _names(self) -> list[str]:
        """Names in safetensors of what is there."""
        known = {meta_layout.part_of(name).name: name for name in expected_tensors(self.config)}
        more = [n for n in self.shapes if n not in known and n not in ("output.weight", "rope.freqs")]
        if more:
            raise SidError(f"{self.folder}: {len(more)} tensors that params.json has no place for, first {more[0]}")
        return [known[name] for name in known if name in self.shapes]

    def _shape(self, name: str) -> tuple[int, ...]:
        part = meta_layout.part_of(name)
        shape = self.shapes[part.name]
        return (shape[0] // self.repeats, *shape[1:]) if part.heads == "kv" else shape


def _repeated(heads: Tensor, times: int) -> bool:
    """Whether heads (H, ...) are H / times heads, each `times` times in a row."""
    groups = heads.unflatten(0, (-1, times))
    return bool((groups == groups[:, :1]).all())


def _rank_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise SidError(f"no consolidated.00.pth in {folder}")
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    names = [path.name for path in paths]
    if names != expected:
        missing = next(name for name in expected if name not in names)
        raise SidError(f"{folder}: {missing} is missing, there is {names[-1]}")
    return paths


def _check_storages(path: Path) -> None:
    """Raise SidError unless every storage has as many bytes in the archive as its tensors take.

    A mapped file is not asked: a storage that is cut short would go on with the bytes of what lies behind it.
    """
    tensors = _load(path).values()
    wanted = sorted({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}.values())
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.split("/")[-2:-1] == ["data"]]
    found = sorted(member.file_size for member in members if member.file_size)
    if wanted != found:
        raise SidError(f"{path}: the tensors take {sum(wanted):,} bytes, but the file stores {sum(found):,}")


def _load(path: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped. Raises SidError for a file that is broken or holds code or anything but tensors."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines() or [one_line(error)]
        raise SidError(f"{path} is refused, for it holds more than tensors: {reason[0]}") from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise SidError(
            f"{path}: not a whole file of torch.save: {one_line(error).partition(' Exception')[0]}"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise SidError(f"{path} must hold a dictionary of tensors")
    return loaded

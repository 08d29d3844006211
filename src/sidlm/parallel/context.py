"""Context parallelism: one sequence over several processes, as Llama 3 does it (arXiv 2407.21783, section 3.3.2).

Each rank runs the whole model on its two chunks of every row (chunks.py). Only mixers look at other positions: a layer
of full attention gathers the keys and values of the sequence, a sliding or 2-simplicial one fetches a halo of as many
positions as its windows reach back (exchange.py). To the mixers this is a cache whose past lies on other ranks. Any
document mask works, since the documents of all positions in front come along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.parallel.chunks import chunk_length, chunks_of, cut, cut_documents, halo_length, join
from sidlm.parallel.exchange import fetch_halo, gather_before, gather_rows

FILL = {"input_ids": 0, "inputs_embeds": 0, "position_ids": 0, "shift_labels": -100}
"""What a batch is cut from, and what pads it at the end; doc_ids are padded with -1."""


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """One rank's part in the context parallelism of a model; built by :func:`context_parallel`.

    It keeps nothing between calls, so micro-batches may overlap, blocks be compiled, and activations be recomputed.
    """

    rank: int
    ranks: int
    group: str
    """name of the process group"""
    windows: tuple[tuple[int, ...] | None, ...]
    """of each layer: (window,), (w1, w2), or None for full attention"""

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the model for this rank's part of a batch, that every rank of the group has whole.

        Args:
            batch: input_ids (B, T) or inputs_embeds (B, T, hidden_size); position_ids and doc_ids (B, T), optional as
                for the model; shift_labels (B, T); num_items_in_batch, by default the labels not ignored in the batch.
                Padding inside a document is not looked for. T need not divide: the end is padded.

        Returns:
            What to call the model with. Its rows are chunks, (2B, C) for T = 2 * ranks * C. The losses of the ranks
            add up to the batch's loss and their gradients to its gradients: to be summed over the group, not averaged.

        Raises:
            ValueError: an argument that cannot be cut (labels, attention_mask, a cache), or shapes that disagree.
        """
        batch = {name: value for name, value in batch.items() if value is not None}
        num_items, doc_ids = batch.pop("num_items_in_batch", None), batch.pop("doc_ids", None)
        unknown = sorted(set(batch) - set(FILL))
        if unknown:
            raise ValueError(
                f"context parallelism cannot cut {', '.join(unknown)}; it takes {', '.join(FILL)}, doc_ids"
            )
        x = batch.get("input_ids", batch.get("inputs_embeds"))
        if x is None or ("input_ids" in batch and "inputs_embeds" in batch):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        b, t = x.shape[:2]
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(t, device=x.device)[None]
        elif doc_ids is None and positions.ndim == 2:  # as without context parallelism, a restart is a new document
            doc_ids = torch.nn.functional.pad((positions[:, 1:] <= positions[:, :-1]).cumsum(dim=1), (1, 0))
        if doc_ids is None:
            doc_ids = torch.zeros_like(positions)
        batch["position_ids"] = _whole_rows("position_ids", positions, b, t)
        doc_ids = _whole_rows("doc_ids", doc_ids, b, t)
        labels = batch.get("shift_labels")
        if labels is not None:
            if tuple(labels.shape) != (b, t):
                raise ValueError(f"shift_labels must be ({b}, {t}), got {tuple(labels.shape)}")
            # a rank must not divide by the number of its own labels
            batch["num_items_in_batch"] = (labels >= 0).sum().clamp_min(1) if num_items is None else num_items
        cuts = {name: cut(batch[name], self.rank, self.ranks, fill) for name, fill in FILL.items() if name in batch}
        before = self.positions_before(chunk_length(t, self.ranks))
        documents = cut_documents(doc_ids, self.rank, self.ranks, before)
        return batch | cuts | {"doc_ids": documents, "sequence_shard": self}

    def positions_before(self, length: int) -> int:
        """Positions in front of chunks of `length` that some layer looks at on this rank."""
        return max(self._reach(window, length) for window in self.windows)

    def _reach(self, window: tuple[int, ...] | None, length: int) -> int:
        everything = chunks_of(self.rank, self.ranks)[1] * length
        return everything if window is None else halo_length(self.rank, self.ranks, length, max(window) - 1)

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *, k2: Tensor | None = None, v2: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """What a cache's update gives: keys and values (2B, G, C, D) of these rows behind those in front of them.

        ``(k, v)``, or ``((k, k2), (v, v2))`` of a 2-simplicial layer; kwargs, of a cache alone, are not read.
        """
        where = (self.rank, self.ranks, self.group)
        window = self.windows[layer_idx]
        pairs = [_pair(k, v)] if k2 is None or v2 is None else [_pair(k, v), _pair(k2, v2)]
        if window is None:
            joined = [gather_before(pairs[0], *where)]
        else:
            before = fetch_halo(pairs, [w - 1 for w in window], *where)
            joined = [torch.cat(parts, dim=1) for parts in zip(before, pairs, strict=True)]
        keys, values = zip(*(x.transpose(1, 2).chunk(2, dim=-1) for x in joined), strict=True)
        return (keys[0], values[0]) if k2 is None else (keys, values)

    @torch.no_grad()
    def join(self, x: Tensor, length: int) -> Tensor:
        """This rank's rows (2B, C, ...) and those of the others -> (B, length, ...), the same on every rank."""
        return join(gather_rows(x, self.ranks, self.group), length)


def context_parallel(config: SidConfig, mesh: DeviceMesh | ProcessGroup) -> ContextParallel:
    """The context parallelism of models of this config over a 1-D mesh or a process group."""
    if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
        raise ValueError(f"context parallelism takes one dimension of a mesh, got {mesh.ndim}: {mesh.mesh_dim_names}")
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    windows = tuple(_windows(config, layer_type) for layer_type in config.layer_types or ())
    return ContextParallel(rank=group.rank(), ranks=group.size(), group=group.group_name, windows=windows)


def _windows(config: SidConfig, layer_type: str) -> tuple[int, ...] | None:
    """The windows of a layer's keys, one for each pair that it exchanges; None if it sees everything."""
    kinds = {
        "full_attention": None,
        "sliding_attention": (config.sliding_window,),
        "simplicial_attention": tuple(config.simplicial_window),
    }
    return kinds[layer_type]


def check_halo(config: SidConfig, length: int, cp: int) -> None:
    """Raise SidError, naming the numbers, where rows of `length` tokens are shorter than the halo of some layer: split
    over `cp` processes each of them would fetch whole rows for it."""
    for layer_type in sorted(set(config.layer_types or ())):
        windows = _windows(config, layer_type)
        if windows is not None and length < max(windows) - 1:
            raise SidError(
                f"parallel.cp {cp}: rows of {length} tokens are shorter than the halo of {max(windows) - 1} positions "
                f"of {layer_type} (windows {', '.join(map(str, windows))}): lower the window or parallel.cp"
            )


def _pair(k: Tensor, v: Tensor) -> Tensor:
    """(2B, G, C, D) twice -> (2B, C, G, 2D): one message for both."""
    return torch.cat((k, v), dim=-1).transpose(1, 2)


def _whole_rows(name: str, x: Tensor, batch: int, length: int) -> Tensor:
    if x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length:
        raise ValueError(f"{name} must be ({batch} or 1, {length}), got {tuple(x.shape)}")
    return x.expand(batch, -1)

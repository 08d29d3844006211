"""How context parallelism cuts a sequence: 2R chunks over R ranks, rank i holds chunks i and 2R - 1 - i.

A query sees what is before it, so a late chunk costs more than an early one; one of each end costs every rank the
same (Llama 3, arXiv 2407.21783, section 3.3.2). A rank's two chunks are two rows of its batch: every layer sees rows of
one chunk each, with the positions before it as keys in front, which is what a cache looks like. Nothing here
communicates.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """The chunks that a rank holds, in the order of its rows."""
    return rank, 2 * ranks - 1 - rank


def holder(chunk: int, ranks: int) -> tuple[int, int]:
    """(rank, row) that holds a chunk."""
    return (chunk, 0) if chunk < ranks else (2 * ranks - 1 - chunk, 1)


def chunk_length(length: int, ranks: int) -> int:
    """Positions of a chunk of a sequence that is padded at its end until 2 * ranks divides it."""
    return -(-length // (2 * ranks))


def cut(x: Tensor, rank: int, ranks: int, fill: float = 0) -> Tensor:
    """(B, T, ...) -> (2B, C, ...), a rank's chunks; rows 2b and 2b + 1 are row b's. The end is padded with fill."""
    size = chunk_length(x.shape[1], ranks)
    missing = 2 * ranks * size - x.shape[1]
    if missing:
        x = torch.cat((x, x.new_full((x.shape[0], missing, *x.shape[2:]), fill)), dim=1)
    return x.unflatten(1, (2 * ranks, size))[:, list(chunks_of(rank, ranks))].flatten(0, 1)


def join(parts: Tensor, length: int) -> Tensor:
    """(R, 2B, C, ...), what :func:`cut` gave each rank, -> (B, length, ...)."""
    heads, tails = parts.unflatten(1, (-1, 2)).unbind(2)  # each (R, B, C, ...)
    return torch.cat((heads, tails.flip(0))).transpose(0, 1).flatten(1, 2)[:, :length]


def cut_documents(doc_ids: Tensor, rank: int, ranks: int, before: int) -> Tensor:
    """(B, T) -> (2B, before + C): the documents of a rank's chunks and of as many positions before each.

    Negative, as padding is, where the sequence has no such position.
    """
    size = chunk_length(doc_ids.shape[1], ranks)
    padded = torch.nn.functional.pad(doc_ids, (before, 2 * ranks * size - doc_ids.shape[1]), value=-1)
    rows = [padded[:, chunk * size : chunk * size + before + size] for chunk in chunks_of(rank, ranks)]
    return torch.stack(rows, dim=1).flatten(0, 1)


class Piece(NamedTuple):
    """A stretch of positions that one rank's halo takes from a chunk."""

    rank: int
    """rank that holds them"""
    row: int
    """which of that rank's two chunks"""
    start: int
    """first position in that chunk"""
    stop: int
    target: int
    """row of the halo"""
    at: int
    """position in the halo"""


def halo_length(rank: int, ranks: int, size: int, halo: int) -> int:
    """Positions in front of a rank's chunks of `size`: `halo`, or what there is before its later chunk."""
    return min(halo, chunks_of(rank, ranks)[1] * size)


@cache
def halo_pieces(rank: int, ranks: int, size: int, halo: int) -> tuple[Piece, ...]:
    """Where the `halo` positions before each of a rank's chunks of `size` come from.

    A chunk shorter than the halo takes from several chunks before it; at the start of the sequence there are fewer
    positions, at the end of the row of the halo.
    """
    length = halo_length(rank, ranks, size, halo)
    pieces = []
    for row, chunk in enumerate(chunks_of(rank, ranks)):
        end = chunk * size
        position = max(end - halo, 0)
        while position < end:
            source, start = divmod(position, size)
            stop = min(size, start + end - position)
            pieces.append(Piece(*holder(source, ranks), start, stop, row, length - (end - position)))
            position += stop - start
    return tuple(pieces)

"""The two exchanges of context parallelism, each one node to autograd, torch.compile and activation checkpointing.

``gather_before`` gives every chunk all positions before it (full attention), ``fetch_halo`` a window of them (sliding
and 2-simplicial attention). Rows are those of :func:`sidlm.parallel.chunks.cut`: a rank's two chunks of row b are its
rows 2b and 2b + 1. A group travels by its name, as in torch's functional collectives.

Gradients go back by all-to-all and are added in float32 in the order of the ranks: the bytes of a reduce-scatter in
the inputs' dtype, but each part is rounded once and the sum once, and the bits are the same every time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from sidlm.parallel.chunks import Piece, halo_length, halo_pieces

# torch renamed it in 2.13
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


def _named(group: Any) -> ProcessGroup:
    return _resolve_process_group(group)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """(2B, C, ...) -> (R, 2B, C, ...), every rank's rows. Not differentiable."""
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=_named(group))
    return parts.unflatten(0, (ranks, -1))


@torch.library.custom_op("sidlm::gather_before", mutates_args=())
def gather_before(x: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    """(2B, C, ...) -> (2B, (2R - rank) C, ...): each row behind all positions before it, by one all-gather.

    Rows end where their chunk does; the earlier chunk has fewer positions before it, and zeros in front of them.
    """
    heads, tails = gather_rows(x, ranks, group).unflatten(1, (-1, 2)).unbind(2)
    chunks = torch.cat((heads, tails.flip(0))).transpose(0, 1)  # (B, 2R, C, ...)
    out = chunks.new_zeros(chunks.shape[0], 2, 2 * ranks - rank, *chunks.shape[2:])
    out[:, 0, -rank - 1 :] = chunks[:, : rank + 1]
    out[:, 1] = chunks[:, : 2 * ranks - rank]
    return out.flatten(0, 1).flatten(1, 2)


@gather_before.register_fake
def _(x, rank, ranks, group):
    return x.new_empty(x.shape[0], (2 * ranks - rank) * x.shape[1], *x.shape[2:])


@torch.library.custom_op("sidlm::scatter_before", mutates_args=())
def scatter_before(grad: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    """(2B, (2R - rank) C, ...) -> (2B, C, ...): the gradient of what :func:`gather_before` took, from all ranks."""
    given = grad.unflatten(1, (2 * ranks - rank, -1)).unflatten(0, (-1, 2))  # (B, 2, 2R - rank, C, ...)
    high = _sum_dtype(grad.dtype)
    chunks = torch.zeros(2 * ranks, given.shape[0], *given.shape[3:], dtype=high, device=grad.device)
    chunks[: 2 * ranks - rank] = given[:, 1].transpose(0, 1)
    chunks[: rank + 1] += given[:, 0, -rank - 1 :].transpose(0, 1)
    parts = torch.stack((chunks[:ranks], chunks[ranks:].flip(0)), dim=2).to(grad.dtype)  # (R, B, 2, C, ...)
    received = torch.empty_like(parts)
    distributed.all_to_all_single(received, parts, group=_named(group))
    return received.sum(dim=0, dtype=high).to(grad.dtype).flatten(0, 1)


@scatter_before.register_fake
def _(grad, rank, ranks, group):
    return grad.new_empty(grad.shape[0], grad.shape[1] // (2 * ranks - rank), *grad.shape[2:])


def _remember(ctx, inputs, output):
    ctx.where = inputs[1:]


def _gather_backward(ctx, grad):
    return scatter_before(grad.contiguous(), *ctx.where), None, None, None


gather_before.register_autograd(_gather_backward, setup_context=_remember)


def _held(chunks: Tensor, piece: Piece) -> Tensor:
    return chunks[:, piece.row, piece.start : piece.stop]


def _taken(halo: Tensor, piece: Piece) -> Tensor:
    return halo[:, piece.target, piece.at : piece.at + piece.stop - piece.start]


def _move(
    sources: list[Tensor], targets: list[Tensor], halos: list[int], size: int, rank: int, ranks: int, group: str, *,
    back: bool,
) -> None:  # fmt: skip
    """Add pieces of sources to targets, each (B, 2, ...): from chunks to halos, or back. Its own need no message."""
    read, write = (_taken, _held) if back else (_held, _taken)

    def pieces(sender: int, receiver: int) -> Iterator[tuple[int, Piece]]:
        taker, giver = (sender, receiver) if back else (receiver, sender)
        for n, halo in enumerate(halos):
            yield from ((n, piece) for piece in halo_pieces(taker, ranks, size, halo) if piece.rank == giver)

    outgoing = [[read(sources[n], piece) for n, piece in pieces(rank, other)] for other in range(ranks)]
    incoming = [[write(targets[n], piece) for n, piece in pieces(other, rank)] for other in range(ranks)]
    for place, part in zip(incoming.pop(rank), outgoing.pop(rank), strict=True):
        place += part
    if ranks == 1 or not any(halos):
        return
    sent = [sum(part.numel() for part in parts) for parts in outgoing]
    sizes = [sum(place.numel() for place in places) for places in incoming]
    for counts in (sent, sizes):
        counts.insert(rank, 0)
    like = sources[0]
    message = torch.cat([like.new_empty(0), *(part.flatten() for parts in outgoing for part in parts)])
    received = like.new_empty(sum(sizes))
    distributed.all_to_all_single(received, message, sizes, sent, group=_named(group))
    places = [place for places in incoming for place in places]
    for place, part in zip(places, received.split([place.numel() for place in places]), strict=True):
        place += part.view(place.shape)


@torch.library.custom_op("sidlm::fetch_halo", mutates_args=())
def fetch_halo(xs: list[Tensor], halos: list[int], rank: int, ranks: int, group: str) -> list[Tensor]:
    """The `halos[n]` positions before each row of every xs[n] (2B, C, ...), by one all-to-all for all of them.

    Each is (2B, h, ...) with h = ``halo_length``; zeros where the sequence has no such position. All of one dtype.
    """
    size = xs[0].shape[1]
    chunks = [x.unflatten(0, (-1, 2)) for x in xs]
    lengths = [halo_length(rank, ranks, size, halo) for halo in halos]
    taken = [x.new_zeros(len(x), 2, length, *x.shape[3:]) for x, length in zip(chunks, lengths, strict=True)]
    _move(chunks, taken, halos, size, rank, ranks, group, back=False)
    return [x.flatten(0, 1) for x in taken]


@fetch_halo.register_fake
def _(xs, halos, rank, ranks, group):
    return [
        x.new_empty(x.shape[0], halo_length(rank, ranks, x.shape[1], h), *x.shape[2:])
        for x, h in zip(xs, halos, strict=True)
    ]


@torch.library.custom_op("sidlm::return_halo", mutates_args=())
def return_halo(grads: list[Tensor], halos: list[int], size: int, rank: int, ranks: int, group: str) -> list[Tensor]:
    """The gradients (2B, size, ...) of what :func:`fetch_halo` took, from those (2B, h, ...) of all ranks' halos."""
    taken = [grad.unflatten(0, (-1, 2)) for grad in grads]
    chunks = [x.new_zeros(len(x), 2, size, *x.shape[3:], dtype=_sum_dtype(x.dtype)) for x in taken]
    _move(taken, chunks, halos, size, rank, ranks, group, back=True)
    return [x.flatten(0, 1).to(grad.dtype) for x, grad in zip(chunks, grads, strict=True)]


@return_halo.register_fake
def _(grads, halos, size, rank, ranks, group):
    return [grad.new_empty(grad.shape[0], size, *grad.shape[2:]) for grad in grads]


def _remember_halo(ctx, inputs, output):
    xs, halos, *where = inputs
    ctx.where = halos, xs[0].shape[1], *where


def _halo_backward(ctx, grads):
    return return_halo([grad.contiguous() for grad in grads], *ctx.where), None, None, None, None


fetch_halo.register_autograd(_halo_backward, setup_context=_remember_halo)

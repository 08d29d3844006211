"""One call a document, for inputs with NaN or infinity: these must not reach the other documents of their row.

A masked weight is zero, but zero times NaN is NaN in a matrix product. The kernels load what they mask as zeros. The
eager form multiplies blocks of rows that are visible to some of a block's queries, so where a value is not finite it
takes the documents apart. Looking for such values would wait for a GPU: this is for CPUs, elsewhere there are kernels.
"""

from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import Tensor


def forward_apart(forward: Callable) -> Callable:
    """Wrap `eager.forward`."""

    @wraps(forward)
    def wrapped(q, k, v, k2, v2, *settings, dtype=None):
        *settings, doc_ids = settings
        if doc_ids is None or not _broken(q, k, v, k2, v2):
            return forward(q, k, v, k2, v2, *settings, doc_ids, dtype)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
        for row, span in _documents(doc_ids, q.shape[1]):
            ids = doc_ids[row : row + 1, span]
            xs = [_cut(x, doc_ids, row, span) for x in (q, k, v, k2, v2)]
            for target, part in zip((out, lse), forward(*xs, *settings, ids, dtype), strict=True):
                target[row : row + 1, _rows(target, doc_ids, span)] = part
        return out, lse

    return wrapped


def backward_apart(backward: Callable) -> Callable:
    """Wrap `eager.backward`."""

    @wraps(backward)
    def wrapped(grad_out, grad_lse, q, k, v, k2, v2, out, lse, *settings, dtype=None):
        *settings, doc_ids = settings
        tensors = (grad_out, grad_lse, q, k, v, k2, v2, out, lse)
        if doc_ids is None or not _broken(*tensors[:-1]):  # the LSE of padding is infinite
            return backward(*tensors, *settings, doc_ids, dtype)
        like = {"dtype": dtype, "memory_format": torch.contiguous_format}
        grads = [torch.zeros_like(x, **like) for x in (q, k, v, k2, v2)]
        for row, span in _documents(doc_ids, q.shape[1]):
            ids = doc_ids[row : row + 1, span]
            parts = backward(*(_cut(x, doc_ids, row, span) for x in tensors), *settings, ids, dtype)
            for target, part in zip(grads, parts, strict=True):
                target[row : row + 1, _rows(target, doc_ids, span)] = part
        return tuple(grads)

    return wrapped


def _broken(*tensors: Tensor) -> bool:
    """Whether a value is not finite; never asked of a GPU."""
    if tensors[0].device.type != "cpu":
        return False
    return not all(
        bool(x.sum(dtype=torch.float64).isfinite()) for x in tensors
    )  # no finite float32 sums overflow there


def _documents(doc_ids: Tensor, steps: int) -> Iterator[tuple[int, slice]]:
    """Row and columns of every document with a query. Padding may lie within a document's columns."""
    for row, ids in enumerate(doc_ids):
        for number in ids[-steps:].unique().tolist():
            if number >= 0:
                at = (ids == number).nonzero()
                yield row, slice(int(at[0]), int(at[-1]) + 1)


def _rows(x: Tensor, doc_ids: Tensor, span: slice) -> slice:
    """The rows of x, which ends where doc_ids does, that lie in these columns."""
    before = doc_ids.shape[1] - x.shape[1]
    return slice(max(span.start - before, 0), span.stop - before)


def _cut(x: Tensor, doc_ids: Tensor, row: int, span: slice) -> Tensor:
    """A document's rows (1, S, ...), zero at padding between them."""
    part = x[row : row + 1, _rows(x, doc_ids, span)]
    padding = doc_ids[row, span.stop - part.shape[1] : span.stop] < 0
    return part.masked_fill(padding.view(1, -1, *[1] * (x.ndim - 2)), 0.0)

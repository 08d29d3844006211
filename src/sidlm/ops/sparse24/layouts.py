"""Orders of the metadata in memory: the plain one (packed.py) and those that backends want.

A layout is a function, written with integer arithmetic alone, so that it takes tensors of torch as well as Triton's:
the place of the byte of columns 8c .. 8c + 7 of a row, where a byte holds two neighbouring groups of four columns, the
earlier one in the low nibble, or else the place of the nibble of a group. `LAYOUTS` is the only other thing to know it.
Kernels read and write layouts of whole bytes. cuSPARSELt's two are not documented; they were found on an H200
(triton_relayout.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor


@no_type_check
def plain(row, c, M, K):
    """Rows one after another."""
    return row * (K // 8) + c


@no_type_check
def cutlass_8bit(row, c, M, K):
    """Blocks of 128 columns one after another, in each a row's 16 bytes after another's (CUTLASS, sm_90, 8 bits)."""
    return c // 16 * (16 * M) + row * 16 + c % 16


@no_type_check
def cusparselt_8bit(row, c, M, K):
    """64 rows by 64 columns one after another, in each the eight bytes of rows r and r + 8 taken turn about (sm_90).

    Of bytes 0 .. 7, i + 4 comes after i.
    """
    tile = row // 64 * (8 * K) + c // 8 * 512
    return tile + row % 64 // 16 * 128 + row % 8 * 16 + c % 4 * 4 + c % 8 // 4 * 2 + row // 8 % 2


@no_type_check
def cusparselt_16bit(row, group, M, K):
    """Nibbles: 64 rows by 32 columns one after another, in each a byte for two rows, r and, above it, r + 8 (sm_90).

    Of groups 0 .. 7, i + 4 comes after i.
    """
    tile = row // 64 * (16 * K) + group // 8 * 512
    return tile + row % 64 // 16 * 128 + row % 8 * 16 + group % 4 * 4 + group % 8 // 4 * 2 + row // 8 % 2


class Layout(NamedTuple):
    byte: Callable[[Any, Any, Any, Any], Any] | None
    """(row, c, M, K) -> offset of the byte of a matrix (M, K); None if its nibbles belong to different rows"""
    nibble: Callable[[Any, Any, Any, Any], Any] | None
    """(row, group, M, K) -> offset of the nibble, where `byte` does not say it"""
    rows: int
    """M is a multiple of this"""
    columns: int
    """K is a multiple of this"""

    def offset(self, row, group, M: int, K: int):
        """Offset of the nibble of a group of four columns: twice the byte's, one more for the high nibble."""
        if self.nibble is not None:
            return self.nibble(row, group, M, K)
        assert self.byte is not None
        return 2 * self.byte(row, group // 2, M, K) + group % 2


LAYOUTS = {
    "plain": Layout(plain, None, 1, 8),
    "cutlass_8bit": Layout(cutlass_8bit, None, 64, 128),
    "cusparselt_8bit": Layout(cusparselt_8bit, None, 64, 64),
    "cusparselt_16bit": Layout(None, cusparselt_16bit, 64, 32),
}


def layout_for(name: str, M: int, K: int) -> Layout:
    """The layout of that name for a matrix (M, K); ValueError if there is none or it does not take this size."""
    if name not in LAYOUTS:
        raise ValueError(f"no metadata layout {name!r}; there are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if M % layout.rows or K % layout.columns:
        raise ValueError(
            f"metadata layout {name!r} takes rows in multiples of {layout.rows} and columns in multiples of "
            f"{layout.columns}, got a matrix ({M}, {K})"
        )
    return layout


def _places(name: str, M: int, K: int, device: torch.device) -> Tensor:
    """int64 (M, K / 4): where the nibbles of the plain layout lie in the layout of that name."""
    row = torch.arange(M, device=device)[:, None]
    return layout_for(name, M, K).offset(row, torch.arange(K // 4, device=device), M, K)


def _nibbles(metadata: Tensor) -> Tensor:
    return torch.stack((metadata.flatten() & 15, metadata.flatten() >> 4), -1).flatten()


def to_layout(metadata: Tensor, name: str) -> Tensor:
    """Plain metadata uint8 (M, K / 8) in another order, still (M, K / 8); raises ValueError as `layout_for`."""
    M, width = metadata.shape
    nibbles = _nibbles(metadata)
    places = _places(name, M, 8 * width, metadata.device).flatten()
    pairs = torch.empty_like(nibbles).scatter_(0, places, nibbles).view(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).view(M, width)


def from_layout(metadata: Tensor, name: str, M: int, K: int) -> Tensor:
    """The plain metadata uint8 (M, K / 8) of a matrix (M, K) from its M * K / 8 bytes in the order of that name."""
    pairs = _nibbles(metadata)[_places(name, M, K, metadata.device)].view(M, K // 8, 2)
    return pairs[..., 0] | pairs[..., 1] << 4

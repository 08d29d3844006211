"""Which tokens of a dialogue are its format: headers and terminations (arXiv 2407.21783, sections 4.1.1 and 4.1.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = ("<|start_header_id|>", "<|end_header_id|>")
TERMINATIONS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


def formatting_mask(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """bool (B, T), True at the formatting tokens of ids (B, T): each header, the role inside it included, every
    termination and the tokenizer's own begin- and end-of-text tokens.

    Which ids these are comes from the tokenizer's vocabulary, so tokenizers without some of them work, too.
    """
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[name] for name in TERMINATIONS if name in vocabulary]
    ends += [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    mask = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    if not all(name in vocabulary for name in HEADER):
        return mask
    start, end = ids == vocabulary[HEADER[0]], ids == vocabulary[HEADER[1]]
    return mask | start | end | _inside(start, end)


def _inside(start: Tensor, end: Tensor) -> Tensor:
    """bool (B, T), True behind a start whose end comes later; a start that is never closed opens nothing."""
    positions = torch.arange(1, start.shape[1] + 1, device=start.device).expand_as(start)
    last_start = (positions * start).cummax(1).values
    last_end = (positions * end).cummax(1).values
    closed = end.flip(1).cumsum(1).flip(1) > 0  # an end at or behind this position
    return (last_start > last_end) & closed

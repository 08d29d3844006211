"""Negative log-likelihood of held-out text, per domain, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from sidlm.data.tokenizer import clean
from sidlm.parallel import reading
from sidlm.parallel.reading import Reader

if TYPE_CHECKING:
    from sidlm.data.sources import Document
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM

ALL = "all"
_GROUP_CHARS = 1 << 20  # documents are tokenised about this much text at a time, so memory does not grow with the data


class Span(NamedTuple):
    """A row of tokens of which ``tokens[start:]`` are scored, each given every token before it in the row."""

    tokens: Sequence[int]
    start: int


@dataclass(kw_only=True)
class DomainNLL:
    """Likelihood of one domain's text. ``nll`` is the sum over its tokens, in nats."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nll: float = 0.0

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The measure that does not depend on the tokenizer: nll / ln 2 / UTF-8 bytes of the text."""
        return self.nll / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nll": self.nll,
            "nll_per_token": self.nll_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


def windows(tokens: Sequence[int], seq_len: int) -> Iterator[Span]:
    """Cut one document (BOS first) into windows of at most ``seq_len`` inputs that overlap by one token:
    the last target of a window is the first input of the next, so every token but BOS is predicted exactly once."""
    for begin in range(0, len(tokens) - 1, seq_len):
        yield Span(tokens[begin : begin + seq_len + 1], 1)


def _batch(spans: Sequence[Span], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spans as right-padded (B, T) int64 inputs, labels (-100 where not scored) and doc_ids (-1 where padding)."""
    width = max(len(span.tokens) for span in spans) - 1
    inputs = torch.zeros(len(spans), width, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    doc_ids = torch.full_like(inputs, -1)
    for row, (tokens, start) in enumerate(spans):
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        length = len(ids) - 1
        if length and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"token id {int(ids.max())} is outside the model's vocabulary of {vocab_size}")
        inputs[row, :length] = ids[:-1]
        labels[row, start - 1 : length] = ids[start:]
        doc_ids[row, :length] = 0
    return inputs, labels, doc_ids


def span_nll(model: SidForCausalLM | Reader, spans: Sequence[Span], *, batch_size: int = 8) -> list[float]:
    """Sum of -log p over each span's scored tokens, in nats, in the order of ``spans``.

    model: a whole model, or a Reader of one that is spread over processes, which all call this alike and share the
    batches. Spans are batched by length and padded on the right with doc_ids = -1. Only hidden states at scored
    positions go through the output matrix, in chunks, so whole logits are never built; sums are in float64.
    Raises ValueError for a token id outside the model's vocabulary and for a span without a scored token or context.
    """
    for span in spans:
        if not 1 <= span.start < len(span.tokens):
            raise ValueError(f"a span of {len(span.tokens)} tokens cannot be scored from token {span.start}")
    reader = model if isinstance(model, Reader) else Reader(model)
    batch_size = max(1, min(batch_size, -(-len(spans) // reader.share[1])))  # none may be left without
    order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens), reverse=True)
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    sums = [0.0] * len(spans)
    was_training = reader.model.training
    reader.model.eval()
    try:
        for turn, own in reader.turns(len(batches)):
            chosen = batches[turn]
            batch = _batch([spans[i] for i in chosen], reader.model.config.vocab_size)
            for i, value in zip(chosen, reader.tokens(reading.nll, *batch).sum(1).tolist(), strict=True):
                sums[i] = value if own else 0.0
    finally:
        reader.model.train(was_training)
    return reader.total(sums)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group, chars = [], 0
    for document in documents:
        group.append(document)
        chars += len(document.text)
        if chars >= _GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def bits_per_byte(
    model: SidForCausalLM | Reader,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    seq_len: int,
    batch_size: int = 8,
) -> dict[str, DomainNLL]:
    """Likelihood of every document's text, summed per domain and over ``"all"`` (the last key).

    A document is BOS and its text's tokens, cut by ``windows`` at ``seq_len`` inputs; every text token is predicted
    exactly once, BOS never, and no EOS is scored. A window's first tokens see little context, so a longer ``seq_len``
    gives a lower number: compare models at one ``seq_len``.
    Raises ValueError if there is no text, if a domain is called "all", or for a token outside the vocabulary.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    totals: dict[str, DomainNLL] = {}
    for group in _groups(documents):
        spans, owners = [], []
        for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
            if not ids:
                continue
            total = totals.setdefault(document.domain, DomainNLL())
            total.documents += 1
            total.tokens += len(ids)
            total.bytes += len(clean(document.text).encode())
            for span in windows([tokenizer.bos_id, *ids], seq_len):
                spans.append(span)
                owners.append(total)
        nlls = span_nll(model, spans, batch_size=batch_size)
        for total, nll in zip(owners, nlls, strict=True):
            total.nll += nll
    if not totals:
        raise ValueError("no text to evaluate: every document is empty, or there is none")
    if ALL in totals:
        raise ValueError(f'a domain is called "{ALL}", the name of the total; rename it')
    parts = [totals[domain] for domain in sorted(totals)]
    result = {domain: totals[domain] for domain in sorted(totals)}
    result[ALL] = DomainNLL(
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        nll=math.fsum(part.nll for part in parts),
    )
    return result

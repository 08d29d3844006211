"""Needle in a haystack: does a model still read, at the end of a long context, a number that stands somewhere in it?

The context is filled with sentences that say nothing; a needle, `The secret number of KEY is DIGITS.`, lies at a depth
of it, and the question at the end repeats the needle up to its digits. An answer counts if each of its tokens is the
most likely one, which is what greedy decoding writes. Llama 3 asks for all of them at a new length before it goes on to
the next (arXiv 2407.21783, sections 3.4.2 and 5.2.6). Everything is made here from a seed: no data, no download.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidlm.errors import SidError
from sidlm.parallel import reading
from sidlm.parallel.reading import Reader

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = ("Alma", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")


@dataclass(frozen=True)
class Needle:
    """One context: ids (length + 1,), of which those from `start` on are the answer."""

    ids: Tensor
    start: int
    depth: float


def needles(tokenizer: Tokenizer, length: int, *, depths: int = 5, repeats: int = 2, seed: int = 0) -> list[Needle]:
    """`repeats` contexts of `length` tokens for each of `depths` depths, evenly from the beginning to the end.

    Raises SidError for a length that question and needle do not fit in.
    """
    rng, found = random.Random(f"{seed} {length}"), []
    filler = tokenizer.encode(FILLER)
    for depth in [i / max(1, depths - 1) for i in range(depths)] * repeats:
        said = f" The secret number of {rng.choice(KEYS)} is"
        question, answer = tokenizer.encode(said), tokenizer.encode(f" {rng.randrange(10**4, 10**5)}")
        needle = [*question, *answer, *tokenizer.encode(".")]
        room = length - len(needle) - len(question) - len(answer)
        if room < 0:
            raise SidError(
                f"a needle and its question need {length - room} tokens, more than the {length} of the context"
            )
        hay = [filler[i % len(filler)] for i in range(room)]
        at = round(depth * room)
        ids = [tokenizer.bos_id, *hay[:at], *needle, *hay[at:], *question, *answer]
        found.append(Needle(torch.tensor(ids), len(ids) - len(answer), depth))
    return found


Read = Callable[[Sequence[Needle]], list[bool]]
"""Which of some needles are read: those of whose answers each token is the most likely one, given those before"""


def needle_recall(read: Read, found: Sequence[Needle]) -> dict[str, float]:
    """{"recall": share of the needles that are read, "depth 0.50": of those at this depth, ...}."""
    every = read(found)
    hits: dict[float, list[bool]] = {}
    for one, hit in zip(found, every, strict=True):
        hits.setdefault(one.depth, []).append(hit)
    shares = {f"depth {depth:.2f}": sum(part) / len(part) for depth, part in sorted(hits.items())}
    return {"recall": sum(every) / len(every)} | shares


def reader_of(model: SidForCausalLM | Reader) -> Read:
    """What a model reads, one forward pass for each needle: with the answer itself in front of each of its tokens, the
    most likely ones are the answer if and only if greedy decoding writes it.

    A Reader of a model that is spread over processes is called by all of them alike, and they share the needles.
    """
    reader = model if isinstance(model, Reader) else Reader(model)

    def read(found: Sequence[Needle]) -> list[bool]:
        hits = [0.0] * len(found)
        for turn, own in reader.turns(len(found)):
            one = found[turn]
            inputs, labels = one.ids[None, :-1], one.ids[None, 1:].clone()
            labels[:, : one.start - 1] = -100
            said = reader.tokens(reading.choice, inputs, labels, torch.zeros_like(inputs))
            hits[turn] = float(own and bool((said == labels)[0, one.start - 1 :].all()))
        return [hit > 0 for hit in reader.total(hits)]

    return read

"""Looking at a model in training: loss on held-out documents, and texts it writes. Neither changes the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sidlm.parallel.reading import Reader, sample
from sidlm.train.build import Text
from sidlm.train.config import RunConfig
from sidlm.train.hardware import autocast
from sidlm.train.metrics import NoLog, RunLog

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer


@contextlib.contextmanager
def observing(reader: Reader, precision: str) -> Iterator[None]:
    """Eval mode, no gradients, the run's precision, no compiled graphs (shapes vary), and the random state put back."""
    model, device = reader.model, reader.device
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            # a sharded model casts its weights itself
            autocast(device, precision if reader.mesh is None else "fp32"),
            torch.random.fork_rng(devices=devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        model.train(was_training)


def validate(reader: Reader, text: Text, cfg: RunConfig, precision: str) -> dict[str, dict[str, float]]:
    """{"all" and each domain: {"loss": nats per token, "bits_per_byte", "documents", "tokens"}}, held-out text.

    Every process calls it; they share the rows.
    """
    from sidlm.evaluate import bits_per_byte

    with observing(reader, precision):
        found = bits_per_byte(
            reader, text.tokenizer, text.valid, seq_len=cfg.data.seq_len, batch_size=cfg.validation.batch_size
        )
    return {
        domain: {
            "loss": nll.nll_per_token,
            "bits_per_byte": nll.bits_per_byte,
            "documents": nll.documents,
            "tokens": nll.tokens,
        }
        for domain, nll in found.items()
    }


def write_samples(
    log: RunLog | NoLog, reader: Reader, tokenizer: Tokenizer, cfg: RunConfig, precision: str, step: int
) -> None:
    """Continue each prompt of the config and log the texts; the same step and seed give the same texts.

    Every process calls it. A token is a forward pass over what is there, without a cache: on any mesh, as in training.
    """
    with observing(reader, precision):
        for index, prompt in enumerate(cfg.samples.prompts):
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
            start, seed = len(ids), cfg.train.seed + 1000 * step + index
            while len(ids) < start + cfg.samples.max_new_tokens and (len(ids) == start or ids[-1] not in _ends(reader)):
                ids.append(next_token(reader, ids, cfg.samples.temperature, seed * 100_003 + len(ids)))
            log.sample(step, prompt, tokenizer.decode(ids[start:], skip_special=True))


def next_token(reader: Reader, ids: list[int], temperature: float, seed: int) -> int:
    """A draw from what the model says after some tokens, at temperature 0 the most likely token."""
    row = torch.tensor([ids])
    labels = torch.full_like(row, -100)
    labels[0, -1] = 0
    look = sample(temperature, reader.model.config.vocab_size, seed)
    drawn = reader.tokens(look, row, labels, torch.zeros_like(row))[0, -1].item()
    return int(reader.total([drawn if reader.share[0] == 0 else 0.0])[0])  # all go on with the first share's


def _ends(reader: Reader) -> list[int]:
    ends = reader.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]

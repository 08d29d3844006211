"""Looking at a model in training: loss on held-out documents, and texts it writes. Neither changes the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
    starts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in cfg.samples.prompts]
    texts = [list(ids) for ids in starts]
    end = reader.model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    with observing(reader, precision):
        for number in range(cfg.samples.max_new_tokens):
            going = [i for i, ids in enumerate(texts) if len(ids) == len(starts[i]) + number and ids[-1] not in ends]
            if not going:
                break
            seeds = [(cfg.train.seed + 1000 * step + i) * 100_003 + number for i in going]
            drawn = next_tokens(reader, [texts[i] for i in going], cfg.samples.temperature, seeds)
            for i, token in zip(going, drawn, strict=True):
                texts[i].append(token)
    for prompt, start, ids in zip(cfg.samples.prompts, starts, texts, strict=True):
        log.sample(step, prompt, tokenizer.decode(ids[len(start) :], skip_special=True))


def next_tokens(reader: Reader, texts: Sequence[Sequence[int]], temperature: float, seeds: Sequence[int]) -> list[int]:
    """For each text, in token ids, a draw from what the model says next; at temperature 0 the most likely token."""
    rows = torch.zeros(len(texts), max(len(ids) for ids in texts), dtype=torch.int64)
    labels, doc_ids = torch.full_like(rows, -100), torch.full_like(rows, -1)
    for i, ids in enumerate(texts):
        rows[i, : len(ids)] = torch.tensor(ids)
        doc_ids[i, : len(ids)] = 0
        labels[i, len(ids) - 1] = i
    look = sample(temperature, reader.model.config.vocab_size, seeds)
    drawn = reader.tokens(look, rows, labels, doc_ids).sum(1)  # 0 but at the one label
    # all go on with the tokens of the first share
    return [int(token) for token in reader.total((drawn * (reader.share[0] == 0)).tolist())]

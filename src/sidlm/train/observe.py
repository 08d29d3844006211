"""Looking at a model in training: loss on held-out documents, and texts it writes. Neither changes the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sidlm.train.build import Text
from sidlm.train.config import RunConfig
from sidlm.train.hardware import autocast
from sidlm.train.metrics import NoLog, RunLog

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer


@contextlib.contextmanager
def observing(model: torch.nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Eval mode, no gradients, the run's precision, no compiled graphs (shapes vary), and the random state put back."""
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            autocast(device, precision),
            torch.random.fork_rng(devices=devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        model.train(was_training)


def validate(
    model: Any, text: Text, cfg: RunConfig, device: torch.device, precision: str
) -> dict[str, dict[str, float]]:
    """{"all" and each domain: {"loss": nats per token, "bits_per_byte", "documents", "tokens"}}, held-out text."""
    from sidlm.evaluate import bits_per_byte

    with observing(model, device, precision):
        found = bits_per_byte(
            model, text.tokenizer, text.valid,
            seq_len=cfg.data.seq_len, batch_size=cfg.validation.batch_size, device=device,
        )  # fmt: skip
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
    log: RunLog | NoLog,
    model: Any,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    device: torch.device,
    precision: str,
    step: int,
) -> None:
    """Continue each prompt of the config and log the texts; the same step and seed give the same texts."""
    for index, prompt in enumerate(cfg.samples.prompts):
        with observing(model, device, precision):
            torch.manual_seed(cfg.train.seed + 1000 * step + index)
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]], device=device)
            warm = cfg.samples.temperature > 0
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=cfg.samples.max_new_tokens,
                do_sample=warm,
                **({"temperature": cfg.samples.temperature, "top_k": 0, "top_p": 1.0} if warm else {}),
                pad_token_id=tokenizer.pad_id,
            )
        log.sample(step, prompt, tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special=True))

"""What a run is made of: its text, and its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidlm.errors import SidError
from sidlm.train.config import RunConfig

if TYPE_CHECKING:
    from sidlm.data.loader import Loader
    from sidlm.data.sources import Document
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM


@dataclass(frozen=True)
class Text:
    """Training batches, held-out documents and the tokenizer; the fingerprint changes with any of the training text."""

    loader: Loader
    valid: list[Document]
    tokenizer: Tokenizer
    fingerprint: str


def open_text(cfg: RunConfig, *, resumed: bool) -> Text:
    """Open the data of a run; a resumed one keeps the tokenizer in its folder. Raises SidError for bad sources."""
    from sidlm.data import Loader, Tokenizer, open_data, prepare_tokenizer

    folder = Path(cfg.train.out) / "tokenizer"
    tokenizer = Tokenizer.load(folder) if resumed else prepare_tokenizer(cfg.data, folder, log=print)
    data = open_data(cfg.data, tokenizer, log=print)
    loader = Loader(data.train, batch_size=cfg.train.batch_size, seed=cfg.train.seed)
    valid = choose_documents(data.valid, cfg.validation.documents, cfg.validation.characters)
    return Text(loader, valid, tokenizer, data.train.fingerprint)


def choose_documents(documents: Sequence[Any], count: int, characters: int) -> list[Document]:
    """At most `count` of the documents, their texts cut to `characters`, one domain after the other in turn.

    Of a large set only 32 * count documents, evenly spaced, are looked at.
    """
    from sidlm.data.sources import Document

    stride = max(1, len(documents) // (32 * count))
    by_domain: dict[str, list[Document]] = {}
    for index in range(0, len(documents), stride):
        document = documents[index]
        queue = by_domain.setdefault(document.domain, [])
        if len(queue) < count and document.text:
            queue.append(Document(document.text[:characters], document.domain))
    turns = [queue[i] for i in range(count) for queue in by_domain.values() if i < len(queue)]
    return turns[:count]


def build_model(cfg: RunConfig, tokenizer: Tokenizer) -> SidForCausalLM:
    """A freshly initialised fp32 model of the preset with its overrides, for the tokenizer's vocabulary.

    Raises SidError for an unknown preset or field (naming the nearest) and for values that do not fit together.
    """
    from sidlm.models import SidForCausalLM, preset

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    settings = {"vocab_size": tokenizer.vocab_size, **ids, **cfg.model.overrides}
    try:
        config = preset(cfg.model.preset, arch=cfg.model.arch, **settings)
    except (ValueError, TypeError) as error:
        raise SidError(f"model: {' '.join(str(error).split())}") from error
    if config.vocab_size < tokenizer.vocab_size:
        raise SidError(f"model vocab_size={config.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens")
    return SidForCausalLM(config).float()


def compile_blocks(model: SidForCausalLM, mode: str, device: torch.device) -> None:
    """Compile each block's forward in place (parameter names stay). "auto": on CUDA only, where it pays at once."""
    if mode == "on" or (mode == "auto" and device.type == "cuda"):
        for block in model.model.layers:
            block.compile()

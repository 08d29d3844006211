"""What a run is made of: its text, and its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidlm.errors import SidError
from sidlm.train.config import RunConfig
from sidlm.train.float8 import convert
from sidlm.train.recipe import phases

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sidlm.data.phases import PhasedLoader
    from sidlm.data.sources import Document
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.config import SidConfig
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Text:
    """Training batches, held-out documents and the tokenizer; the fingerprint changes with any of the training text."""

    loader: PhasedLoader
    valid: list[Document]
    tokenizer: Tokenizer
    fingerprint: str


def open_text(
    cfg: RunConfig, *, resumed: bool, share: tuple[int, int] = (0, 1), log: Callable[[str], None] | None = print
) -> Text:
    """Open the data of a run; a resumed one keeps the tokenizer in its folder. Raises SidError for bad sources.

    share: (index, count), which part of the rows of a batch this process reads.
    """
    from sidlm.data import Tokenizer, open_data, prepare_tokenizer
    from sidlm.data.phases import PhasedLoader

    folder = Path(cfg.train.out) / "tokenizer"
    settings = cfg.data
    if cfg.model.init_from and not settings.tokenizer:
        settings = dataclasses.replace(settings, tokenizer=str(start_folder(cfg.model.init_from)))
    tokenizer = Tokenizer.load(folder) if resumed else prepare_tokenizer(settings, folder, log=log)
    data = open_data(cfg.data, tokenizer, log=log)
    rank, world = share
    loader = PhasedLoader(data.train, phases(cfg), seed=cfg.train.seed, rank=rank, world=world)
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


def build_model(
    cfg: RunConfig, tokenizer: Tokenizer, mesh: DeviceMesh | None, device: torch.device, precision: str, *,
    resumed: bool = False,
) -> tuple[SidForCausalLM, Pipeline | None]:  # fmt: skip
    """The fp32 model of a run, spread over the mesh, and what runs it in stages if there are any.

    It is built on the meta device: a process never holds more of the weights than its parts (materialize.py).
    Fresh weights of the preset are a function of train.seed, the same on any mesh; else they are init_from's.
    resumed: they come from a checkpoint of the run, and are undefined here.
    Raises SidError for an unknown preset or field (naming the nearest) and for values that do not fit together.
    """
    from sidlm.models import SidForCausalLM
    from sidlm.models.convert.source import SafetensorsCheckpoint, read_config
    from sidlm.models.initial import distributions
    from sidlm.parallel.context import check_halo
    from sidlm.parallel.materialize import allocate, draw_weights, read_weights

    start = start_folder(cfg.model.init_from) if cfg.model.init_from else None
    config = _fresh(cfg, tokenizer) if start is None else read_config(start, cfg.model.overrides)
    if config.vocab_size < tokenizer.vocab_size:
        raise SidError(f"model vocab_size={config.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens")
    # before any memory: what is missing or has another shape must not start at random
    checkpoint = SafetensorsCheckpoint(start, cfg.model.overrides) if start is not None and not resumed else None
    if cfg.parallel.cp > 1:
        check_halo(config, min(phase.seq_len for phase in phases(cfg)), cfg.parallel.cp)
    with torch.device("meta"):
        model = SidForCausalLM(config).float().train()
    fresh = distributions(model, config)  # before layers are exchanged and stages lose theirs
    pipeline = spread(model, cfg, mesh, device, precision)
    allocate([model] if pipeline is None else pipeline.stages, device)
    if checkpoint is not None:
        read_weights(model, checkpoint)
    elif not resumed:
        draw_weights(model, fresh, cfg.train.seed)
    if start is not None:
        _generate_alike(model, start)
    return model, pipeline


def _fresh(cfg: RunConfig, tokenizer: Tokenizer) -> SidConfig:
    from sidlm.models import preset

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    settings = {"vocab_size": tokenizer.vocab_size, **ids, **cfg.model.overrides}
    try:
        return preset(cfg.model.preset, arch=cfg.model.arch, **settings)
    except (ValueError, TypeError) as error:
        raise SidError(f"model: {' '.join(str(error).split())}") from error


def start_folder(path: str) -> Path:
    """The model folder of model.init_from: itself or, of a run, its folder `model`. Raises SidError without one."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise SidError(f"model.init_from: no config.json in {path} nor in {Path(path) / 'model'}")


def _generate_alike(model: SidForCausalLM, folder: Path) -> None:
    """Take over how the model in a folder is to be sampled, which is exported with the weights."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def spread(
    model: SidForCausalLM, cfg: RunConfig, mesh: DeviceMesh | None, device: torch.device, precision: str
) -> Pipeline | None:
    """float8 products, recomputed and compiled blocks, shards over a mesh, in place (parameter names stay). Before the
    optimizer. Of a mesh with pipeline stages, returns what runs them."""
    from sidlm.parallel.recompute import recompute_block

    if cfg.train.float8 != "off":
        convert(model, cfg.train.float8, device, cfg.parallel.tp)
    compiled = cfg.train.compile == "on" or (cfg.train.compile == "auto" and device.type == "cuda")
    if mesh is None:
        for block in model.model.layers:
            recompute_block(block, cfg.train.recompute, compiled=compiled)
        return None
    from sidlm.parallel.shard import ShardConfig, parallelize

    settings = ShardConfig(
        precision=precision,
        reshard_after_forward=cfg.parallel.reshard_after_forward,
        recompute=cfg.train.recompute,
        compile=compiled,
        pipeline=cfg.parallel.pipeline,
        ep=cfg.parallel.ep,
    )
    return parallelize(model, mesh, settings)

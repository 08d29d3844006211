"""What several commands share: the argument parser, finding and loading a model folder, number types."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sidlm.errors import SidError

if TYPE_CHECKING:
    import torch

    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.train.config import RunConfig


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and name the nearest option for one it does not know."""

    def __init__(self, command: str, about: str, example: str) -> None:
        super().__init__(
            prog=f"sid {command}",
            description=about,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise SidError(f"{self.prog}: {message} (see `{self.prog} --help`)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        # a value after an unknown option is unknown too; the option is what to name
        first = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        options = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(first, options, n=1, cutoff=0.5)
        self.error(f"unknown argument {first!r}" + (f"; did you mean {near[0]}?" if near else ""))


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], Any]:
    """An argparse type: an int or a float within [low, high]."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes the GPU if there is one")


def resolve_device(name: str) -> torch.device:
    """The torch device of ``--device``. Raises SidError for one that torch cannot use here."""
    from sidlm.train import hardware

    return hardware.resolve_device(name, "--device ")


def model_folder(path: str | Path) -> Path:
    """The folder with config.json: ``path`` itself or, for a run folder, ``path/model``. Raises SidError otherwise."""
    path = Path(path)
    if not path.exists():
        raise SidError(f"no such folder: {path}")
    if not path.is_dir():
        raise SidError(f"not a folder: {path} (give the folder that holds config.json, e.g. a run folder)")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise SidError(f"no config.json in {path} nor in {path / 'model'}: not a model or a run folder")


def run_config(path: str | Path) -> RunConfig | None:
    """The config of the run that made the model folder ``path`` (or the run folder), None if it lies in no run."""
    from sidlm.train.config import load_config

    file = model_folder(path).parent / "config.yaml"
    return load_config(file) if file.is_file() else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved with a model. Raises SidError if it is missing or broken."""
    from sidlm.data.tokenizer import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise SidError(f"no tokenizer.json in {folder}: copy the tokenizer that the model was trained with there")
    return Tokenizer.load(folder)


def load_model(folder: Path, device: torch.device, tokenizer: Tokenizer) -> SidForCausalLM:
    """The model in ``folder``, in the dtype it was saved in, in eval mode on ``device``.

    Raises SidError if weights are missing, pickled, have another shape than config.json says, or if the tokenizer has
    more tokens than the model: transformers would go on with random numbers in the first and the third case.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from sidlm.models import SidConfig, SidForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = SidConfig.from_pretrained(folder)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SidError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    check_vocab(tokenizer, config.vocab_size)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise SidError(f"{folder}: {pickled[0]} is a pickle, which is not read: save it as safetensors first")
    try:
        loaded: Any = SidForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise SidError(f"{folder}: {_first_line(error)}") from error
    model, info = loaded
    if info["mismatched_keys"]:
        name, saved, wanted = min(info["mismatched_keys"])
        raise SidError(
            f"{folder}: {name} has shape {tuple(saved)} in the checkpoint but {tuple(wanted)} by config.json"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise SidError(f"{folder}: {len(missing)} weights are missing in the checkpoint, the first is {missing[0]}")
    return model.to(device).eval()


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises SidError if the tokenizer could give the model a token that it does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise SidError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {vocab_size}: they do not belong "
            "together"
        )


def load(path: str, device: str) -> tuple[SidForCausalLM, Tokenizer]:
    """Model and tokenizer of a model or run folder, on ``device`` ("auto", "cpu", ...)."""
    folder = model_folder(path)
    tokenizer = load_tokenizer(folder)
    return load_model(folder, resolve_device(device), tokenizer), tokenizer


def write_json(path: str | Path, data: Any) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Text in, packed rows of tokens out. Modules: config, tokenizer, sources, cache, packing, mixing, loader."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidlm.data.config import DataConfig
    from sidlm.data.loader import Batch, Data, Loader, TrainDataset, open_data
    from sidlm.data.prepare import prepare_tokenizer
    from sidlm.data.sources import Document, iter_documents
    from sidlm.data.tokenizer import Tokenizer, train_tokenizer

_HOME = {
    "DataConfig": "config",
    "Batch": "loader",
    "Data": "loader",
    "Loader": "loader",
    "TrainDataset": "loader",
    "open_data": "loader",
    "prepare_tokenizer": "prepare",
    "Document": "sources",
    "iter_documents": "sources",
    "Tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}
__all__ = [
    "Batch",
    "Data",
    "DataConfig",
    "Document",
    "Loader",
    "Tokenizer",
    "TrainDataset",
    "iter_documents",
    "open_data",
    "prepare_tokenizer",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    # on demand, so that `import sidlm.data.config` costs neither torch nor numpy
    if name in _HOME:
        return getattr(importlib.import_module(f"sidlm.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sidlm.data' has no attribute {name!r}")

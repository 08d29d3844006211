"""Byte-level BPE with Llama 3's split rule and special-token layout (arXiv 2407.21783, section 3.2)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.data.chat_template import GUARD, chat_template
from sidlm.data.ranks import backend_of_ranks, read_ranks
from sidlm.errors import SidError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# cl100k's rule: contractions | letters after at most one symbol | 1-3 digits | punctuation | newlines | spaces
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
NAMED_SPECIALS = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)  # fmt: skip
# names tried, in this order, in a tokenizer.json that comes without a config saying which is which
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]")


def special_tokens(count: int = 256) -> list[str]:
    """Llama 3's special tokens in id order: 11 named ones, then reserved_special_token_2... up to `count` in all."""
    if count < len(NAMED_SPECIALS):
        raise ValueError(f"num_special must be at least {len(NAMED_SPECIALS)} (the named Llama 3 tokens), got {count}")
    names = [*NAMED_SPECIALS, *(f"reserved_special_token_{i}" for i in range(2, count - len(NAMED_SPECIALS) + 2))]
    return [f"<|{name}|>" for name in names]


class Tokenizer:
    """A `tokenizers` backend that cannot turn user text into a special token.

    `encode` adds no special token; data code adds bos and eos itself. Round trips are exact for every Unicode string
    when the backend is byte-level BPE without a normalizer, as trained ones are. A lone surrogate, which UTF-8 cannot
    hold, becomes U+FFFD.
    """

    def __init__(
        self, backend: Backend, *, bos: str, eos: str, pad: str, name: str = "tokenizer", template: str | None = None
    ) -> None:
        from tokenizers import AddedToken

        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        for content in dict.fromkeys((bos, eos, pad)):
            if backend.token_to_id(content) is None:
                raise SidError(f"{name}: special token {content!r} is not in the vocabulary")
            if content not in added or not added[content].special:  # otherwise plain text could become it
                backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad
        self.bos_id, self.eos_id, self.pad_id = (self._id(t) for t in (bos, eos, pad))
        specials = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.special_ids: dict[str, int] = {content: i for i, content in sorted(specials.items())}
        self.chat_template = chat_template(self.special_ids) if template is None else template
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        _add_bos_template(backend, bos, self.bos_id)
        self._check_safe(name)
        payload = json.dumps([json.loads(backend.to_str()), bos, eos, pad], sort_keys=True)
        self.fingerprint: str = hashlib.sha256(payload.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size}, bos={self.bos_token!r}, eos={self.eos_token!r}, {self.fingerprint[:8]})"

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never a special one, without bos and eos."""
        return self.backend.encode(clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        batch = self.backend.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids, special tokens by name unless skip_special. Raises ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja for `load` and for AutoTokenizer.

        AutoTokenizer's own encoding reads the name of a special token as that token, as everywhere in transformers,
        unless it is called with split_special_tokens=True; a chat rendered with the template is safe as it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        saved = _with_guard(json.loads(self.backend.to_str()))
        _write_atomically(folder / "tokenizer.json", json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            _write_atomically(folder / "chat_template.jinja", self.chat_template)
        _write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a folder with a tokenizer.json, or such a file itself, Sid's or anybody's; or a Llama 3 tokenizer.model.

        The ends of a document come from tokenizer_config.json beside the file, else from well-known names; where only
        one of bos and eos exists it serves as both. A chat_template.jinja in the folder is kept. A tokenizer.model is
        read where a folder has no tokenizer.json (`from_ranks`).
        Raises FileNotFoundError, or SidError for a file that is no tokenizer or has neither.
        """
        from tokenizers import Tokenizer as Backend

        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        ranks = path / "tokenizer.model" if path.is_dir() else path
        if ranks.suffix == ".model" and ranks.is_file() and (ranks == path or not file.is_file()):
            return cls.from_ranks(ranks)
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: expected a tokenizer.json or a folder with one")
        try:
            backend = Backend.from_str(json.dumps(_without_guard(json.loads(file.read_text(encoding="utf-8")))))
        except Exception as error:  # the library raises bare Exception for everything
            raise SidError(f"{file} is not a tokenizer.json: {error}") from error
        named = _configured_specials(file.parent)
        added = [t.content for _, t in sorted(backend.get_added_tokens_decoder().items())]
        bos = _first_known((named.get("bos_token"), *BOS_NAMES), added)
        eos = _first_known((named.get("eos_token"), *EOS_NAMES), added)
        if bos is None and eos is None:
            found = ", ".join(added[:8]) or "none"
            raise SidError(f"{file} has no begin- or end-of-text token (special tokens found: {found})")
        bos, eos = bos or eos, eos or bos
        assert bos is not None and eos is not None
        pad = _first_known((named.get("pad_token"), *PAD_NAMES), added) or eos
        template = file.parent / "chat_template.jinja"
        own = template.read_text(encoding="utf-8") if path.is_dir() and template.is_file() else None
        return cls(backend, bos=bos, eos=eos, pad=pad, name=str(file), template=own)

    @classmethod
    def from_ranks(cls, path: str | Path, *, num_special: int = 256) -> Tokenizer:
        """Llama 3's own tokenizer from its tokenizer.model, whose special tokens follow the ranks; the same ids as its.

        Raises FileNotFoundError, or SidError naming the line for a file that is not of this format.
        """
        tokens = read_ranks(path)
        backend = backend_of_ranks(tokens, SPLIT_PATTERN)
        return cls(_add_specials(backend, num_special), **_LLAMA_ENDS, name=str(path))

    def _id(self, content: str) -> int:
        token = self.backend.token_to_id(content)
        assert token is not None
        return token

    def _check_safe(self, name: str) -> None:
        ids = set(self.special_ids.values())
        for content in self.special_ids:
            for text in (content, f"a{content}b", f" {content}\n"):
                hit = ids.intersection(self.encode(text))
                if hit:
                    raise SidError(
                        f"{name}: the text {text!r} encodes to special token id {min(hit)}; such a tokenizer is unsafe"
                    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, num_special: int = 256) -> Tokenizer:
    """Train byte-level BPE of vocab_size tokens in total, the last num_special of them special (Llama 3's order).

    The same texts in the same order give the same tokenizer. Too little text gives a smaller vocabulary than asked.
    Raises ValueError when vocab_size cannot hold 256 bytes and the special tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    special_tokens(num_special)  # checks the number
    num_ranks = vocab_size - num_special
    if num_ranks < 256:
        needed = 256 + num_special
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes + {num_special} special tokens = {needed}")
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator((clean(text) for text in texts), trainer)
    return Tokenizer(_add_specials(backend, num_special), **_LLAMA_ENDS)


def clean(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD (surrogate pairs joined), so that it has a UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


_LLAMA_ENDS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|finetune_right_pad_id|>"}
_DROP_GUARD = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}


def _add_specials(backend: Backend, count: int) -> Backend:
    from tokenizers import AddedToken

    names = special_tokens(count)
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in names])
    return backend


def _with_guard(saved: dict[str, Any]) -> dict[str, Any]:
    """The contents of a tokenizer.json whose text loses the guard that the chat template puts into it."""
    own = saved.get("normalizer")
    both = [_DROP_GUARD, own] if own else [_DROP_GUARD]
    return saved | {"normalizer": {"type": "Sequence", "normalizers": both}}


def _without_guard(saved: dict[str, Any]) -> dict[str, Any]:
    """The same without it: this library's own encoding is exact for every character and guards by itself."""
    normalizer = saved.get("normalizer")
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    if not steps or steps[0] != _DROP_GUARD:
        return saved
    return saved | {"normalizer": steps[1] if len(steps) == 2 else None}


def _add_bos_template(backend: Backend, bos: str, bos_id: int) -> None:
    # a model trained on bos + text must be prompted with bos by everyone who loads the folder
    from tokenizers import processors

    if backend.num_special_tokens_to_add(False) == 0:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )


def _configured_specials(folder: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SidError(f"{file} is not valid JSON: {error}") from error
        for key in ("bos_token", "eos_token", "pad_token"):
            value = config.get(key) if isinstance(config, dict) else None
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[key] = content
    return names


def _first_known(names: Iterable[str | None], added: Sequence[str]) -> str | None:
    return next((name for name in names if name is not None and name in added), None)


def _write_atomically(path: Path, text: str) -> None:
    # several processes of one run may save the same tokenizer at once
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

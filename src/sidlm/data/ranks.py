"""Byte-pair ranks files (tiktoken's format, Llama 3's ``tokenizer.model``) as tokenizers of this library.

Such a file has one token a line, its bytes in base64 and its rank, which is its id and its merge priority. The file of
Llama 3 itself is under Meta's licence and is never part of this package: it is read from a path.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from sidlm.errors import SidError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKEN_BYTES = 4096
"""A longer token is no token of a language; its pairs would take quadratic time."""


def read_ranks(path: str | Path) -> list[bytes]:
    """The tokens of a ranks file in id order.

    Raises FileNotFoundError, or SidError naming the line for anything but base64 and the next rank, for a token that
    comes twice, and for a file that lacks one of the 256 single bytes: some text could not be encoded with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ranks file at {path}")
    tokens: list[bytes] = []
    seen: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            if not words:
                continue
            where = f"{path}, line {number}"
            if len(words) != 2:
                raise SidError(f"{where}: expected a token in base64 and its rank, found {len(words)} words")
            try:
                token, rank = base64.b64decode(words[0], validate=True), int(words[1])
            except (binascii.Error, ValueError) as error:
                raise SidError(f"{where}: expected a token in base64 and its rank: {error}") from error
            if rank != len(tokens):
                raise SidError(f"{where}: rank {rank} where {len(tokens)} is next")
            if not token or len(token) > MAX_TOKEN_BYTES:
                raise SidError(f"{where}: a token of {len(token)} bytes; 1 to {MAX_TOKEN_BYTES} are possible")
            if token in seen:
                raise SidError(f"{where}: the token of rank {seen[token]} again")
            seen[token] = rank
            tokens.append(token)
    missing = [byte for byte in range(256) if bytes((byte,)) not in seen]
    if missing:
        raise SidError(f"{path}: {len(missing)} of the 256 single bytes have no token, the first is {missing[0]:#04x}")
    return tokens


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which byte-pair encoding by ranks prefers them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for token in tokens:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def backend_of_ranks(tokens: list[bytes], pattern: str) -> Backend:
    """A byte-level BPE backend with these tokens, whose words are split by ``pattern`` (a regular expression)."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letter = byte_letters()
    written = {token: "".join(letter[byte] for byte in token) for token in tokens}
    model = models.BPE(
        vocab={written[token]: rank for rank, token in enumerate(tokens)},
        merges=[(written[left], written[right]) for left, right in merges_of(tokens)],
        ignore_merges=True,  # a word that is a token is that token, whatever merges would make of it
    )
    backend = Backend(model)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

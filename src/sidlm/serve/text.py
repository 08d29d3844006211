"""Tokens to text piece by piece: no piece cuts a character, and none shows a part of a stop string."""

from collections.abc import Iterable, Sequence

from sidlm.data.ranks import byte_letters
from sidlm.data.tokenizer import Tokenizer

_BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token, which may be a part of a character; the name of a special one."""
    written = tokenizer.backend.id_to_token(token) or ""
    if written not in tokenizer.special_ids and type(tokenizer.backend.decoder).__name__ == "ByteLevel":
        values = [_BYTES.get(letter) for letter in written]
        if None not in values:
            return bytes(value for value in values if value is not None)
    return tokenizer.decode([token]).encode()


class Detokenizer:
    """Text as soon as it is whole.

    A token may end in the middle of a UTF-8 character; decoding then ends in U+FFFD. Those are held back until the
    next tokens complete them, or until the end shows that they are really broken. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._written = 0  # characters of the pending tokens' text that are out already

    def feed(self, ids: Iterable[int]) -> str:
        """What can be said after these tokens."""
        self._pending += ids
        text = self._tokenizer.decode(self._pending, skip_special=True)
        whole = text.rstrip("\ufffd")
        piece = whole[self._written :]
        self._written += len(piece)
        if whole == text:
            self._pending, self._written = [], 0
        return piece

    def end(self) -> str:
        """What was held back."""
        piece = self._tokenizer.decode(self._pending, skip_special=True)[self._written :]
        self._pending, self._written = [], 0
        return piece


class StopStrings:
    """Ends a text before the first of some strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What of the text so far can be shown; ``stopped`` is set once a stop string is complete."""
        if self.stopped:
            return ""
        text = self.held + piece
        at = min((i for i in map(text.find, self._stops) if i >= 0), default=-1)
        if at >= 0:
            self.stopped, self.held = True, ""
            return text[:at]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back because a stop string could have begun there."""
        text, self.held = self.held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of the text that begins the stop string."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

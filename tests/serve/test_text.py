from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.serve.text import Detokenizer, StopStrings

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(TEXT, st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_pieces_are_whole_characters_and_make_the_text(tokenizer, text, step):
    ids, stream = tokenizer.encode(text), Detokenizer(tokenizer)
    pieces = [stream.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
    for piece in pieces:
        piece.encode()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + stream.end() == text


def test_broken_bytes_and_special_tokens(tokenizer):
    stream, byte = Detokenizer(tokenizer), tokenizer.encode("é")[0]
    assert stream.feed([byte]) == "" and stream.feed(tokenizer.encode("b")) == "\ufffdb"
    assert stream.feed([tokenizer.eos_id]) == "" and stream.feed([byte]) == "" and stream.end() == "\ufffd"
    assert stream.end() == ""


@given(
    st.lists(st.text("abc", max_size=5), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_the_text_ends_before_the_first_stop_string(pieces, stops):
    """Whatever the pieces, and no part of a stop string was shown before."""
    filtered, shown = StopStrings(stops), ""
    text = ""
    for piece in pieces:
        text += piece
        shown += filtered.feed(piece)
        # what any stop string in the text so far begins, whichever is complete first
        ends = [text.find(stop) for stop in stops if stop in text]
        if ends:
            assert filtered.stopped
            break
        assert not filtered.stopped
        kept = len(text) - len(shown)
        assert text.startswith(shown) and (kept == 0 or any(s.startswith(text[len(text) - kept :]) for s in stops))
    if filtered.stopped:
        assert shown == text[: min(text.find(stop) for stop in stops if stop in text)]
        assert filtered.feed("abc") == filtered.end() == ""
    else:
        assert shown + filtered.end() == text

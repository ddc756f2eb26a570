"""Texts as pages and figures show them: all of it can be seen, none of it acts."""

import pytest

from crossattention.views.labels import shortened, shown


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("ab c", "ab c"),
        ("", "∅"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        ("\x00\t\n\x1b[0m\x7f", "␀␉␊␛[0m␡"),
        ("\x85\u2028\ud800", "⟦U+0085⟧⟦U+2028⟧⟦U+D800⟧"),
        ("\u202eabc\u200f", "⟦U+202E⟧abc⟦U+200F⟧"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("👩‍👧", "👩‍👧"),
        ("<b>&amp;", "<b>&amp;"),
    ],
)
def test_every_character_is_seen(text, seen):
    assert shown(text) == seen
    assert seen.encode("utf-8")


def test_a_long_text_ends_in_an_ellipsis():
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"

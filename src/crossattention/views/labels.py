"""Texts of the data as pages and figures show them: nothing invisible, nothing that could act.

Control characters become their symbols, invisible marks of direction their code points; what makes up an emoji or joins
letters stays. (Terminals get escapes instead: `alignment.escaped`.)
"""

import unicodedata

JOINERS = "\u200c\u200d"  # they shape Persian words and emoji, and are seen by what they do
DELETE = "\x7f"


def shown(text: str) -> str:
    r"""Show a text so that every character of it can be seen.

    Args:
        text: any text, also with lone surrogates.

    Returns:
        Control characters as the symbols of U+2400 (NUL as ␀, a line's end as ␊), other invisible or unwritable characters
        as ⟦U+200F⟧; a text of spaces alone as open boxes; a lone accent on a dotted circle; the empty text as ∅.

    Example:
        >>> shown("a\x00b\n"), shown("\u202ex"), shown(" "), shown("")
        ('a␀b␊', '⟦U+202E⟧x', '␣', '∅')
    """
    if not text:
        return "∅"
    if not text.strip(" "):
        return "␣" * len(text)
    seen = "".join(map(_shown, text))
    return f"◌{seen}" if unicodedata.combining(seen[0]) else seen


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; an ellipsis stands for what is cut off."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(char: str) -> str:
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == DELETE:
        return "␡"
    category = unicodedata.category(char)
    is_invisible = category in {"Cc", "Cs", "Zl", "Zp", "Cn"} or (category == "Cf" and char not in JOINERS)
    return f"⟦U+{ord(char):04X}⟧" if is_invisible else char

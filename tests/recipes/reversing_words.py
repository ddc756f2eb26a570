"""The toy data of these tests: words of three letters, and their letters from the back."""

import itertools

from crossattention.recipes.pair_task import ModelShape

TINY = ModelShape(dim=32, heads=2, encoder_layers=1, decoder_layers=1, feed_forward_dim=64, dropout=0.0)


def write_reversed_words(path):
    """Every word of three letters out of seven, and its letters from the back."""
    words = ["".join(letters) for letters in itertools.product("abcdefg", repeat=3)]
    path.write_text("".join(f"{word}\t{' '.join(reversed(word.upper()))}\n" for word in words), encoding="utf-8")
    return path

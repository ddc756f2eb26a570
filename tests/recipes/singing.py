"""Toy sounds: every letter is a tone, so that what is said lies in the sound from left to right."""

import itertools
import math

import torch

from crossattention.data.sounds import write_wav

RATE = 8_000
LETTERS = "abcdef"


def sung(word):
    """The samples of a word: 80 ms a letter, each its own tone."""
    time = torch.arange(round(0.08 * RATE)) / RATE
    return torch.cat([0.5 * torch.sin(2 * math.pi * 300 * 1.4 ** LETTERS.index(letter) * time) for letter in word])


def write_songs(folder, lengths=(3, 4), count=None):
    """A folder of sung words without two equal letters in a row, with its table."""
    words = ["".join(word) for length in lengths for word in itertools.product(LETTERS, repeat=length)]
    words = [word for word in words if all(a != b for a, b in itertools.pairwise(word))][:count]
    for word in words:
        write_wav(folder / f"{word}.wav", sung(word), RATE)
    (folder / "transcripts.tsv").write_text("".join(f"{word}.wav\t{word}\n" for word in words))
    return folder

"""Texts that nothing but their neighbours can tell: passages of words drawn at random, each in several documents."""

import random
from pathlib import Path

from crossattention.retrieval import Settings, build

CHUNK = 8


def write_copies(folder: Path, *, documents: int = 60, passages: int = 40, words: int = 40, seed: int = 0) -> Path:
    """Each document is some passages, shuffled; a passage is the same wherever it stands."""
    drawn = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    lexicon = ["".join(drawn.choice(syllables) for _ in range(2)) for _ in range(60)]
    texts = [" ".join(drawn.choice(lexicon) for _ in range(words)) + "\n" for _ in range(passages)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        (folder / f"text{number}.txt").write_text("".join(drawn.sample(texts, 3)), encoding="utf-8")
    return folder


def database_of(folder: Path, path: Path) -> Path:
    """A database of short chunks."""
    build(path, [folder], settings=Settings(chunk_length=CHUNK, vocab_size=400, neighbours=6))
    return path

"""A small corpus whose documents repeat each other, shared by the tests of the database."""

import json
import random
from pathlib import Path

WORDS = "the cat sat on a mat while rain fell over hills and nobody came to see what had been lost in deep water".split()
SMALL = {"vocab_size": 300, "chunk_length": 8, "neighbours": 3}


def sentence(random_: random.Random, words: int = 12) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(words)) + ".\n"


def write_corpus(folder: Path, *, files: int = 6, sentences: int = 8, seed: int = 0) -> Path:
    """Text files, a JSONL file, and copied passages between them."""
    random_ = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shared = [sentence(random_) for _ in range(4)]
    for number in range(files):
        lines = [sentence(random_) for _ in range(sentences)]
        lines.insert(number % sentences, shared[number % 4])
        (folder / f"text{number}.txt").write_text("".join(lines), encoding="utf-8")
    rows = [json.dumps({"text": sentence(random_) + shared[number % 4]}) for number in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder

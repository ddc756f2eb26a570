"""A build that prints its peak resident memory in bytes: run by `test_memory.py` in a process of its own."""

import json
import sys
from pathlib import Path

from crossattention.retrieval import Settings, build


def peak_bytes() -> int:
    """Of this process alone: `getrusage` gives a child what its parent had."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    corpus, path, neighbours, exact_below = sys.argv[1:]
    peaks = {}

    def note(step: str, done: int, total: int) -> None:
        peaks[step] = peak_bytes()

    settings = Settings(vocab_size=600, neighbours=int(neighbours), exact_below=int(exact_below))
    chunks = build(Path(path), [corpus], settings=settings, on_progress=note).added_chunks
    print(json.dumps({"chunks": chunks, **peaks}))


if __name__ == "__main__":
    main()

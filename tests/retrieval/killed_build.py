"""A build that ends itself by SIGKILL when a step has come so far: run by `test_killed.py` in a process of its own."""

import os
import signal
import sys
from pathlib import Path

from crossattention.retrieval import Settings, build, building


def main() -> None:
    corpus, path, step, at = sys.argv[1:]
    small = {"COMMIT_ROWS": 20, "COMMIT_QUERIES": 32, "EMBED_ROWS": 16, "QUERY_ROWS": 16, "SHARD_ROWS": 128}
    for name, rows in small.items():
        setattr(building, name, rows)
    seen = 0

    def kill(name: str, done: int, total: int) -> None:
        nonlocal seen
        seen += name == step
        if seen == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    settings = Settings(chunk_length=8, vocab_size=300, neighbours=3, exact_below=20)
    build(Path(path), [corpus], settings=settings, on_progress=kill)


if __name__ == "__main__":
    main()

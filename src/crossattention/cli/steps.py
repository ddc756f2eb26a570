"""How far the steps of a database have come, on stderr: a bar a step in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0
WHAT = {
    "list": ("reading the files", "bytes"),
    "tokenizer": ("training the tokenizer", "bytes"),
    "tokens": ("cutting documents into chunks", "bytes"),
    "counts": ("counting n-grams", "chunks"),
    "embeddings": ("embedding", "chunks"),
    "index": ("indexing", "chunks"),
    "neighbours": ("finding neighbours", "chunks"),
}


@contextmanager
def showing_steps() -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes step, done and total, for as long as the block lasts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, redirect_stdout=False) as progress:
        tasks: dict[str, object] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                words, unit = WHAT.get(step, (step, ""))
                tasks[step] = progress.add_task(f"{words} ({unit})", total=total)
            progress.update(tasks[step], completed=done, total=total)  # type: ignore[arg-type]

        yield show


class _Lines:
    """A line when a step ends, and one every ten seconds within it."""

    def __init__(self) -> None:
        self.printed_at = time.monotonic()
        self.ended: set[str] = set()

    def __call__(self, step: str, done: int, total: int) -> None:
        is_end = done >= total and step not in self.ended
        if not is_end and time.monotonic() - self.printed_at < SECONDS_BETWEEN_LINES:
            return
        if is_end:
            self.ended.add(step)
        elif step in self.ended:
            return
        words, unit = WHAT.get(step, (step, ""))
        print(f"{words}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)
        self.printed_at = time.monotonic()

"""What every verb that uses a run says on stderr, so that stdout stays data: which weights, and that it is at work."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossattention.recipes.recipe import Run


def load_and_say(folder: Path) -> "Run":
    """Load a run; name its weights on stderr, so that stdout stays data.

    Raises:
        FileNotFoundError, ValueError: as `load_run`.
    """
    from crossattention.recipes.run import load_run

    run = load_run(folder)
    step = "" if run.step is None else f", step {run.step:,}"
    print(f"loaded {run.path} ({run.recipe}{step}, sha256 {weights_digest(run)[:12]})", file=sys.stderr)
    return run


def weights_digest(run: "Run") -> str:
    """The SHA-256 of the run's weight file."""
    from crossattention.checkpoints.files import sha256_of

    return sha256_of(run.path / "model.safetensors")


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr, if that is a terminal, that something takes its time, and how much it took.

    Args:
        what: the first words to show.

    Returns:
        A context manager; it gives a function that takes other words to show.
    """
    with _shown(what, has_total=False) as update:
        yield lambda words: update(description=words)


@contextmanager
def measuring(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr, if that is a terminal, a bar of how far something has come.

    Args:
        what: the words beside the bar.

    Returns:
        A context manager; it gives a function that takes how much is done, and how much there is.
    """
    with _shown(what, has_total=True) as update:
        yield lambda done, total: update(completed=done, total=total)


@contextmanager
def _shown(what: str, *, has_total: bool) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda **changes: None
        return
    amount = [BarColumn(), MofNCompleteColumn()] if has_total else []
    columns = [SpinnerColumn("line"), TextColumn("{task.description}", markup=False), *amount, TimeElapsedColumn()]
    # Without redirection: rich would send what is printed to stdout, data for a file, to this terminal.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=None)
        yield lambda **changes: progress.update(task, **changes)

"""What every verb that uses a run says on stderr, so that stdout stays data: which weights, and that it is at work."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossattention.recipes.run import Run


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


def waiting(what: str) -> AbstractContextManager[object]:
    """Show on stderr, if that is a terminal, that something takes its time, and how much it took."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    progress = Progress(
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    progress.add_task(what, total=None)
    return progress

"""What a person sees while a model trains: a live screen in a terminal, plain lines everywhere else.

Draws the events of the training loop; changes nothing and decides nothing. Text of the data is escaped and becomes
`rich.text.Text`, in which nothing is markup.
"""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from crossattention.cli import lines
from crossattention.training.events import Evaluated, Event, Finished, Started, Step
from crossattention.views.alignment import SMALLEST_WIDTH, alignment_blocks

SECONDS_BETWEEN_LINES = 10.0
LINES_BESIDE_THE_MAP = 8  # blank lines, the example's three, the progress, the shell's prompt
FEWEST_MAP_LINES = 6


class Screen(Protocol):
    """Draws events. A context manager: the terminal is whole again after a fault or Ctrl-C."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *fault: object) -> None: ...

    def draw(self, event: Event) -> None:
        """Show what an event says."""
        ...


def screen_for(console: Console) -> Screen:
    """The live screen where lines can be redrawn; plain lines in a pipe, a dumb terminal, a CI log."""
    can_redraw = console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")
    return LiveScreen(console) if can_redraw else PlainLines(console)


def map_lines(example: Mapping[str, Any], console: Console, *, max_height: int | None = None) -> list[str]:
    """The map of an example (rows, columns, weights) for this terminal: its width, its colours, its encoding."""
    picture = alignment_blocks(
        example["rows"],
        example["columns"],
        example["weights"],
        max_width=max(SMALLEST_WIDTH, console.width) if console.is_terminal else None,
        max_height=max_height,
        has_colour=console.color_system in ("256", "truecolor"),
        is_ascii=not console.encoding.startswith("utf"),
    )
    return picture.split("\n")


class PlainLines:
    """One line an evaluation, and one every ten seconds between them: for files, pipes and logs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.printed_at = -SECONDS_BETWEEN_LINES
        self.example: Mapping[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def draw(self, event: Event) -> None:
        """Print a line, or nothing if one was printed just now."""
        if isinstance(event, Started):
            self._print(*lines.started(event))
        elif isinstance(event, Step):
            if time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
                self._print(f"{lines.place(event)}  {lines.pace(event)}")
        elif isinstance(event, Evaluated):
            self.example = event.sample or self.example
            about = lines.sample(event.sample) if event.sample else []
            self._print(lines.evaluated(event), *(f"  {line}" for line in about))
        elif isinstance(event, Finished) and self.example and self.example.get("rows"):
            self._print(*map_lines(self.example, self.console))

    def _print(self, *texts: str) -> None:
        for text in texts:
            self.console.print(Text(text), soft_wrap=True)
        self.console.file.flush()  # a log that is being followed
        self.printed_at = time.monotonic()


class LiveScreen:
    """Evaluations scroll by; below them one held-out example, its map and the progress are redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.picture: list[RenderableType] = []
        self.progress = Progress(
            TextColumn("{task.fields[place]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[pace]}", markup=False),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=None, place="starting", pace="")
        self.live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=4,
            redirect_stderr=sys.stderr.isatty(),  # rich would send warnings meant for a file to this terminal
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.progress.update(self.task, visible=False)
        self.live.stop()

    def draw(self, event: Event) -> None:
        """Redraw what an event changes."""
        self.live.start()  # not before: of several processes only the first gets events, and only it may draw
        if isinstance(event, Started):
            self._scroll(*lines.started(event))
        elif isinstance(event, Step):
            place, pace = lines.place(event), lines.pace(event)
            self.progress.update(self.task, completed=event.step, total=event.total_steps, place=place, pace=pace)
        elif isinstance(event, Evaluated):
            self._scroll(lines.evaluated(event))
            self.picture = self._picture(event.sample) if event.sample else self.picture
            self.live.refresh()

    def _scroll(self, *texts: str) -> None:
        for text in texts:
            self.console.print(Text(text))

    def _picture(self, example: Mapping[str, Any]) -> list[RenderableType]:
        texts = [Text(line, style="bold", no_wrap=True, overflow="ellipsis") for line in lines.sample(example)]
        if not example.get("rows"):
            return [Text(), *texts, Text()]
        room = max(FEWEST_MAP_LINES, self.console.height - LINES_BESIDE_THE_MAP)
        picture = map_lines(example, self.console, max_height=room)
        blocks = [Text.from_ansi(line, no_wrap=True, overflow="crop") for line in picture]
        return [Text(), *texts, Text(), *blocks, Text()]

    def _render(self) -> Group:
        return Group(*self.picture, self.progress)

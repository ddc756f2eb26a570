"""`crossattention train RECIPE`: train a model, watch it learn, and hear at the end what it knows."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from crossattention.cli import lines
from crossattention.cli.main import EXIT_OK, EXIT_USER, unknown
from crossattention.cli.screen import screen_for
from crossattention.cli.settings import Order, read_order
from crossattention.cli.weights import load_and_say, measuring, waiting
from crossattention.recipes.listing import RECIPES
from crossattention.views.alignment import escaped

if TYPE_CHECKING:
    from crossattention.recipes.recipe import Examples, RecipeTask, Run

NUM_EXAMPLES = 10
WIDTH_OF_A_LOG = 120
WIDEST_NAME = 60
"""Terminal cells that what was read takes in a sentence."""


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Train, then show the scores, some answers and what to type next."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_help(prog))
        return EXIT_OK if arguments else EXIT_USER
    recipe = arguments[0]
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, list(RECIPES), f"{prog} --help"))
    order = read_order(recipe, arguments[1:], prog=f"{prog} {recipe}")
    console = Console(highlight=False, quiet=not _is_first())
    task = _read_data(order, console)
    if _train(task, order, console):
        _show_results(order, task, console)
    return EXIT_OK


def _is_first() -> bool:
    """Whether this process tells: alone, or the first of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _help(prog: str) -> str:
    recipes = [f"  {name:<10}{recipe.what}" for name, recipe in RECIPES.items()]
    rest = ["", f"  {prog} RECIPE --help   its flags", "", f"Start here: {prog} g2p"]
    return "\n".join([f"usage: {prog} RECIPE ...", "", "Train a model. The recipes:", "", *recipes, *rest])


def _read_data(order: Order, console: Console) -> "RecipeTask":
    with waiting("reading the data") if _is_first() else nullcontext():
        task = order.build_task()
    _print(console, *task.notes)
    return task


def _train(task: "RecipeTask", order: Order, console: Console) -> bool:
    """Train to the end; False in the processes of a group that only help the first.

    Raises:
        KeyboardInterrupt: Ctrl-C, with the command that resumes.
        SystemExit: SIGTERM.
    """
    from crossattention.training.events import Finished, Interrupted, Started
    from crossattention.training.folder import RunFolder
    from crossattention.training.loop import train

    event = None
    try:
        with screen_for(console) as screen:
            for event in train(task, order.training, order.run.out, resume=order.run.resume):
                if isinstance(event, Started):
                    _print(console, f"training {order.recipe} in {order.run.out}; Ctrl-C saves where it stands")
                screen.draw(event)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not RunFolder(order.run.out).config_file.is_file():
            raise KeyboardInterrupt("stopped before the training began; nothing was written") from None
        saved = f"saved at step {event.step:,}" if isinstance(event, Interrupted) else "stopped between two checkpoints"
        message = f"{saved}; to go on:\n  {order.resume_command}"
        if not _is_first():
            raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
        if isinstance(stop, SystemExit):
            print(message, file=sys.stderr)
            raise
        raise KeyboardInterrupt(message) from None
    if isinstance(event, Finished):
        _print(console, lines.finished(event))
    return isinstance(event, Finished)


def _show_results(order: Order, task: "RecipeTask", console: Console) -> None:
    """The scores on unseen examples, some of these beside the data's answers, where the run lies, what to type next."""
    from crossattention.recipes.run import evaluate

    loaded = load_and_say(order.run.out)
    out = shlex.quote(str(order.run.out))
    try:
        with measuring("scoring the examples that it has never seen (Ctrl-C leaves that out)") as show:
            scores = lines.score_table(evaluate(loaded, on_progress=show), loaded.subsets)
    except KeyboardInterrupt:
        scores = [f"not scored; this does it: crossattention evaluate {out}"]
    examples = task.examples(loaded, NUM_EXAMPLES)
    width = console.width if console.is_terminal else WIDTH_OF_A_LOG
    _print(console, "", "On examples that it has never seen:", *scores)
    _print(console, "", f"{len(examples.rows)} of them:", *_table(examples, width))
    _print(console, "", _write_view(loaded, order, task))
    _print(console, "", f"The run lies in {out}. Ask it:", f"  crossattention predict {out} {shlex.join(examples.to_ask)}")


def _write_view(loaded: "Run", order: Order, task: "RecipeTask") -> str:
    """Write the page of the example that was drawn while it trained, and say where it lies."""
    from crossattention.recipes.recipe import name_of
    from crossattention.views.pages import write_page

    text = lines.shortened(escaped(name_of(task.sample_input)), WIDEST_NAME)
    try:
        path = write_page(loaded.view(task.sample_input), order.run.out / "view.html")
    except ValueError as fault:  # a model that has learned nothing may write nothing
        return f"No view of {text}: {fault}"
    return f"What it reads of {text}, to open in a browser: {path}"


def _table(examples: "Examples", width: int) -> list[str]:
    """The examples in straight columns, or as paragraphs where these are too wide."""
    rows = []
    for is_right, cells in examples.rows:
        texts = [lines.or_nothing(text) if at in examples.answers else escaped(text) for at, text in enumerate(cells)]
        for at, widest in examples.widest.items():
            texts[at] = lines.shortened(texts[at], widest)
        rows.append(["yes" if is_right else "", *texts])
    return lines.records(["right", *examples.labels], rows, width=width, has_header=True)


def _print(console: Console, *texts: str) -> None:
    for text in texts:
        console.print(Text(text), soft_wrap=True)

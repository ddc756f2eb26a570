"""Events, scores and predictions as plain lines of text: no colours, no cursor, no markup."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from crossattention.recipes.listing import COUNTS, SHARES
from crossattention.training.events import Evaluated, Finished, Started, Step
from crossattention.views.alignment import escaped


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them.

    Example:
        >>> duration(65), duration(3725.4)
        ('1:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def score(name: str, value: float) -> str:
    """One score: a share as a percentage, a count whole, all else with three decimals.

    Example:
        >>> score("per_macro", 0.1404), score("bleu", 31.2), score("words", 10011)
        ('14.0 %', '31.200', '10,011')
    """
    if name in COUNTS:
        return f"{value:,.0f}"
    return f"{100 * value:.1f} %" if name.startswith(SHARES) else f"{value:.3f}"


def scores(metrics: Mapping[str, float]) -> str:
    """Several scores on one line, in their own order; how many examples they are of goes without saying."""
    return "  ".join(f"{name} {score(name, value)}" for name, value in metrics.items() if name not in COUNTS)


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines with straight columns, two blanks apart.

    Args:
        rows: cells; every row has as many.
        right: columns that end flush, as numbers do.

    Example:
        >>> aligned([["cat", "1"], ["horse", "12"]], right=[1])
        ['cat     1', 'horse  12']
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, index: int) -> str:
        blanks = " " * (widths[index] - cell_len(text))
        return blanks + text if index in right else text + blanks

    return ["  ".join(cell(text, index) for index, text in enumerate(row)).rstrip() for row in rows]


def records(
    labels: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    right: Sequence[int] = (),
    has_header: bool = False,
) -> list[str]:
    """Rows with straight columns if these are no wider than `width`; else each row as a paragraph, a cell a line.

    Args:
        labels: of the columns; in a paragraph they stand before the cells.
        rows: cells; at least one row. A paragraph leaves out empty ones.
        width: in terminal cells.
        right: columns that end flush.
        has_header: the labels stand above the columns too.
    """
    table = aligned([labels, *rows] if has_header else rows, right=right)
    if all(cell_len(line) <= width for line in table):
        return table
    paragraphs = []
    for row in rows:
        cells = [[label, cell] for label, cell in zip(labels, row, strict=True) if cell]
        paragraphs += ["", *aligned(cells)]
    return paragraphs[1:]


def score_table(metrics: Mapping[str, float], subsets: Mapping[str, str]) -> list[str]:
    """All scores of a run: one line a subset of the held-out examples, one column a score.

    Args:
        metrics: the scores.
        subsets: how their names may end -> what they are of then; "" is the end of all other names.
    """
    by_subset: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        suffix = next((suffix for suffix in subsets if suffix and name.endswith(suffix)), "")
        by_subset.setdefault(suffix, {})[name.removesuffix(suffix)] = value
    names = list(dict.fromkeys(name for found in by_subset.values() for name in found))
    rows = [["", *names]]
    for suffix in (suffix for suffix in subsets if suffix in by_subset):
        found = by_subset[suffix]
        rows.append([subsets[suffix], *(score(name, found[name]) if name in found else "" for name in names)])
    return aligned(rows, right=range(1, len(names) + 1))


def started(event: Started) -> list[str]:
    """What is trained, where, and where it goes on from."""
    begin = f"{event.parameters:,} parameters on {event.device}"
    if event.resumed_from is not None:
        begin += f", resumed at step {event.step:,} from {event.resumed_from}"
    return [begin, *(f"note: {note}" for note in event.notes)]


def place(event: Step) -> str:
    """How far the training is."""
    total = "" if event.total_steps is None else f"/{event.total_steps:,}"
    return f"step {event.step:,}{total}"


def pace(event: Step) -> str:
    """Loss, speed and time left."""
    left = "" if event.seconds_left is None else f"  {duration(event.seconds_left)} left"
    return f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s{left}"


def evaluated(event: Evaluated) -> str:
    """The scores of an evaluation."""
    return f"step {event.step:,}: {scores(event.metrics)}{'  (best so far)' if event.is_best else ''}"


def finished(event: Finished) -> str:
    """How the run ended."""
    return f"trained {event.step:,} steps in {duration(event.seconds)}; the best model is of step {event.best_step:,}"


def sample(example: Mapping[str, Any]) -> list[str]:
    """A held-out example: what the model read, what it wrote, and what stands in the data."""
    texts = [("reads", "source", ""), ("writes", "predicted", "ipa"), ("data", "reference", "reference_ipa")]
    return aligned([[label, or_nothing(example[text]), spoken(example.get(ipa))] for label, text, ipa in texts])


def or_nothing(text: str) -> str:
    """A text of the data or of a model in one line, also where a young model writes none."""
    return escaped(text) or "(nothing yet)"


def spoken(ipa: str | None) -> str:
    """IPA between its strokes; nothing where there is none."""
    return f"/{escaped(ipa)}/" if ipa else ""


def shortened(text: str, width: int) -> str:
    """A text of at most so many terminal cells; an ellipsis stands for what is cut off.

    Example:
        >>> shortened("T IH T IH T IH", 8)
        'T IH T…'
    """
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1).rstrip()}…"

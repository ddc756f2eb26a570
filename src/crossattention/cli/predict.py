"""`crossattention predict`: a run's answers, to questions given as arguments or one a line on standard input."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from crossattention.cli.lines import records
from crossattention.cli.questions import BATCH_SIZE, Question, questions_from_arguments, questions_from_stdin
from crossattention.cli.screen import map_lines
from crossattention.cli.weights import load_and_say, waiting
from crossattention.views.alignment import escaped

if TYPE_CHECKING:
    from crossattention.recipes.recipe import Answer, Input, Run

Answered = tuple["Input", "list[Answer]"]
Ask = Callable[["list[Input]"], "Iterator[list[Answer]]"]


@dataclass(frozen=True)
class PredictArguments:
    """Ask a run: a text as an argument or, without one, one a line on standard input, answered while lines come.

    What is asked may also be a file, or several words a question, tabs between them in a line: the recipe says so.
    Prints a line an answer: text, prediction, IPA where the prediction is phonemes, score; tabs between them, or
    straight columns in a terminal. The score ranks the answers to one text: where it is written, the log-probability,
    normalised for length.

    Args:
        run: folder of the run.
        text: what to answer; standard input is read where there is none.
        best: answers to each text, best first.
        beams: width of the beam search of a run that writes text, at least `best`; 4, or `best` if that is more, where it is
            not given.
        map: show below each text what its best answer reads of it, as a map.
        json: print one JSON object a text.
        skip_bad: leave out texts that cannot be read, and say so on stderr, where otherwise the first ends the command.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]")] = ()
    best: int = 1
    beams: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    map: bool = False
    json: bool = False
    skip_bad: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Answer every text, each batch as soon as it is there."""
    given = tyro.cli(PredictArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    from crossattention.recipes.run import check_beams

    loaded = load_and_say(given.run)
    check_beams(loaded, given.beams)
    search = {"beams": max(4, given.best) if given.beams is None else given.beams} if loaded.has_beams else {}
    ask = partial(loaded.predict, num_hypotheses=given.best, batch_size=BATCH_SIZE, **search)
    ask([])  # a fault in the numbers is found before any text is read
    names = loaded.input_names
    batches = questions_from_arguments(given.text, names) if given.text else questions_from_stdin()
    num_answered = 0
    with _counter(names, reads_stdin=not given.text) as say_count:
        for batch in batches:
            answers, fault = _answer(ask, names, batch, skip_bad=given.skip_bad)
            _write(loaded, answers, given)
            num_answered += len(answers)
            say_count(num_answered)
            if fault is not None:
                raise fault
    return 0


def _answer(ask: Ask, names: Sequence[str], batch: list[Question], *, skip_bad: bool) -> tuple[list[Answered], ValueError | None]:
    """The answers to a batch, up to its first unreadable text; with `skip_bad` all of them, these said on stderr."""
    try:
        inputs = [question.given(names) for question in batch]
        return list(zip(inputs, ask(inputs), strict=True)), None
    except ValueError as fault:
        if len(batch) == 1:
            [question] = batch
            if skip_bad:
                print(f"left out: {question.place}{fault}", file=sys.stderr)
                return [], None
            advice = "; --skip-bad leaves such lines out" if question.place else ""
            return [], ValueError(f"{question.place}{fault}{advice}")
    # By halves, to find what cannot be read and answer the rest in few batches.
    answers, stopper = _answer(ask, names, batch[: len(batch) // 2], skip_bad=skip_bad)
    if stopper is None:
        more, stopper = _answer(ask, names, batch[len(batch) // 2 :], skip_bad=skip_bad)
        answers += more
    return answers, stopper


def _write(loaded: "Run", answers: list[Answered], given: PredictArguments) -> None:
    """Write a batch and flush it: whoever reads our output may be waiting for just this answer."""
    names = loaded.input_names
    if given.json:
        lines = [_as_json(loaded, asked, found, with_map=given.map) for asked, found in answers]
    elif given.map:
        lines = [line for asked, found in answers for line in _with_map(loaded, asked, found)]
    else:
        lines = _as_lines([row for asked, found in answers for row in _rows(asked, found)], names)
    for line in lines:
        print(line)
    sys.stdout.flush()


def _rows(asked: "Input", answers: list["Answer"]) -> list[list[str]]:
    """What was asked, answer, IPA where there is one, score: all in one line each, whatever characters they hold."""
    words = [escaped(word) for word in ((asked,) if isinstance(asked, str) else asked)]
    rows = []
    for found in answers:
        spoken = getattr(found, "ipa", None)
        rows.append([*words, escaped(found.text), *([] if spoken is None else [escaped(spoken)]), f"{found.score:.3f}"])
    return rows


def _as_lines(rows: list[list[str]], names: Sequence[str]) -> list[str]:
    """Straight columns for a person, tabs for a program."""
    if not rows or not sys.stdout.isatty():
        return ["\t".join(row) for row in rows]
    asked = [name.lower() for name in names]
    labels = [*asked, "answer", *(["IPA"] if len(rows[0]) == len(asked) + 3 else []), "score"]
    return records(labels, rows, width=Console().width, right=[len(labels) - 1])


def _with_map(loaded: "Run", asked: "Input", answers: list["Answer"]) -> list[str]:
    map_of_best = loaded.align(asked, answers[0].text)
    console = Console()
    return [*_as_lines(_rows(asked, answers), loaded.input_names), *map_lines(asdict(map_of_best), console), ""]


def _as_json(loaded: "Run", asked: "Input", answers: list["Answer"], *, with_map: bool) -> str:
    facts: dict[str, Any] = {"input": asked, "predictions": [asdict(found) for found in answers]}  # type: ignore[call-overload]
    if with_map:
        facts["alignment"] = asdict(loaded.align(asked, answers[0].text))
    return json.dumps(facts, ensure_ascii=False)


@contextmanager
def _counter(names: Sequence[str], *, reads_stdin: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many lines are answered, unless a person sees the answers themselves."""
    if reads_stdin and sys.stdin.isatty():
        print(f"one {', tab, '.join(names).lower()} a line; Ctrl-D ends", file=sys.stderr)
    if not reads_stdin or sys.stdin.isatty() or sys.stdout.isatty():
        yield lambda count: None
        return
    with waiting("answered: 0") as say:
        yield lambda count: say(f"answered: {count:,}")

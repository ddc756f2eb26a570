"""What a recipe offers to training and to the command line: the protocol of its module and its task, the class of a loaded run.

What does not live here: the list of recipes (`listing`), and any recipe's knowledge, which lies in its own module.

A recipe of your own, in five steps:

1. Write `recipes/NAME.py` with the members of `RecipeModule`: `CONFIG`, `TASK`, `default_training`, `config_from_json`, `open_run`.
2. `CONFIG` is a frozen dataclass with plain fields; its docstring's Args become the help of `crossattention train NAME`.
3. `TASK` is a class with the members of `RecipeTask`: those of the training loop (`training.tasks.Task`) and three more. Its
   model has `save_pretrained` (the mixin `models.pretrained.Pretrained`, and an entry in its `FAMILIES`), so `load_run` finds it.
4. `open_run` gives a subclass of `Run` with `predict`, `evaluate` and `view`; `align`, `feed_forward_view` and beams where they
   make sense. What words ask it is `input_names`: ("TEXT",), ("SOUND",), ("PICTURE", "QUESTION").
5. In `listing`, add a line to `RECIPES`, and names of scores to `SHARES` or `COUNTS`; write tests in
   `tests/recipes/test_NAME.py` and a page in `docs/`.

The loop, the verbs train, evaluate, predict and view, and the screen then know it. A library that only this recipe needs is
imported inside a function, and its absence is said by `listing.missing_extra`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from crossattention.training.tasks import Task

if TYPE_CHECKING:
    from crossattention.training.config import TrainConfig
    from crossattention.views.content import AttentionView, FeedForwardView

Input = str | tuple[str, ...]
"""What a run is asked: a text or the name of a file; a tuple of them where `Run.input_names` has several."""

OnProgress = Callable[[int, int], None]
"""Is told now and then how much is done, and how much there is."""


class RecipeModule(Protocol):
    """What the module of a recipe has at its head."""

    CONFIG: type
    """The settings: a frozen dataclass that checks them. A field without a default must be given on the command line."""

    TASK: Callable[..., RecipeTask]
    """`TASK(config, seed=0)` reads the data."""

    def default_training(self) -> TrainConfig:
        """The training settings that go with the defaults."""
        ...

    def config_from_json(self, fields: Mapping[str, Any]) -> Any:
        """The settings out of what `RecipeTask.describe` wrote as "config"."""
        ...

    def open_run(self, path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> Run:
        """The run out of its parts; Args as those of `Run`.

        Raises:
            KeyError, TypeError: the description lacks something; `load_run` says that task.json is damaged.
            ValueError: the parts do not belong together; the message names the files.
        """
        ...


class RecipeTask(Task, Protocol):
    """A `Task` of the training loop that the command line can tell of.

    `describe()` holds at least "recipe" (the name in `listing.RECIPES`) and "config" (the settings, for JSON). The sample of an
    `Evaluation` has source, predicted and reference, texts in one line each, and where a map makes sense its rows, columns and
    weights (rows x columns).
    """

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the data once it is read, such as lines that were left out; a sentence each."""
        ...

    @property
    def sample_input(self) -> Input:
        """The held-out input of which a view is written after the training; `Run.view` takes it."""
        ...

    def examples(self, run: Any, count: int) -> Examples:
        """Some held-out examples with the answers of a run of this task, to be shown after the training."""
        ...


@dataclass(frozen=True)
class Examples:
    """Held-out examples beside a model's answers, as a table.

    Args:
        labels: of the columns after the first, which says what is right.
        rows: one example each: whether the answer is right, and a text a column, of any characters.
        to_ask: what to type after `crossattention predict RUN`.
        answers: columns, counted from 0, that the model wrote: where such a text is empty, the table says so.
        widest: column -> the most terminal cells of a text in it; longer ones are cut.
    """

    labels: tuple[str, ...]
    rows: tuple[tuple[bool, tuple[str, ...]], ...]
    to_ask: tuple[str, ...]
    answers: tuple[int, ...] = ()
    widest: Mapping[int, int] = field(default_factory=dict)


class Answer(Protocol):
    """One answer of a run: a dataclass, all of whose fields are written as JSON. `ipa: str | None` is shown where it has one."""

    @property
    def text(self) -> str:
        """The answer: a text, the name of a class."""
        ...

    @property
    def score(self) -> float:
        """By which several answers to one input are ranked, the highest first."""
        ...


@dataclass(frozen=True)
class Run(ABC):
    """A trained model with all that its recipe needs.

    Args:
        path: the folder that holds the weights.
        recipe: its name, one of `listing.RECIPES`.
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
    """

    path: Path
    recipe: str
    description: Mapping[str, Any]
    step: int | None

    input_names: ClassVar[tuple[str, ...]] = ("TEXT",)
    """What one question is made of. With one name an `Input` is a text, with several a tuple of them."""

    shows_feed_forward: ClassVar[bool] = False
    """Whether `feed_forward_view` shows anything."""

    has_beams: ClassVar[bool] = False
    """Whether `predict` and `evaluate` take `beams`, the width of a beam search; 1 is greedy."""

    subsets: ClassVar[Mapping[str, str]] = MappingProxyType({"": "all"})
    """How the names of scores may end -> which of the held-out examples such a score is of; a line of the table each."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """The model itself, in evaluation mode."""

    @abstractmethod
    def predict(self, inputs: Iterable[Any], *, num_hypotheses: int = 1, batch_size: int = 32) -> Iterator[list[Any]]:
        """Answer inputs as they come: a list of at most `num_hypotheses` answers each (`Answer`), the best first.

        Raises:
            ValueError: at once: a number out of range, also where there are no inputs; while iterating, after the answers to all
                inputs before it: an input that cannot be read.
        """

    @abstractmethod
    def evaluate(self, *, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Scores on all examples that training never saw.

        Raises:
            FileNotFoundError: a data file of the run is missing.
            ValueError: the data is not what the run was trained on.
        """

    @abstractmethod
    def view(self, given: Any, answer: str | None = None) -> AttentionView:
        """What the model reads of an input.

        Args:
            given: the input.
            answer: the output to look at, in the place of the run's own best.

        Raises:
            ValueError: nothing can be shown, or the recipe takes no answer.
        """

    def align(self, given: Any, predicted: str) -> Any:
        """What an answer read of an input, as a small map for the terminal: a dataclass of rows, columns and weights.

        Raises:
            ValueError: a run of this recipe has none.
        """
        raise ValueError(f"a run of {self.recipe} has no map for the terminal; `crossattention view` shows what it reads")

    def sample_input(self) -> Input:
        """An input to look at where none is given, always the same one.

        Raises:
            ValueError: a run of this recipe has none.
        """
        raise ValueError(f"a run of {self.recipe} has no input of its own; name one: {' '.join(self.input_names)}")

    def feed_forward_view(
        self, given: Any, answer: str | None = None, *, num_examples: int = 300, on_progress: OnProgress | None = None
    ) -> FeedForwardView:
        """Which keys of the feed-forward layers fire while an input is answered.

        Raises:
            ValueError: a run of this recipe does not show them.
        """
        raise ValueError(f"a run of {self.recipe} does not show its feed-forward layers; leave out --feed-forward")


def name_of(given: Input) -> str:
    """An input in one line.

    Example:
        >>> name_of(("cat.png", "what is it?"))
        'cat.png what is it?'
    """
    return given if isinstance(given, str) else " ".join(given)

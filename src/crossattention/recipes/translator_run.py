"""Runs of recipes that turn texts into texts: what a `Translator` does, in the shape that the command line asks for.

What lives here: all that such recipes share. What does not: their data and scores (`g2p`, `seq2seq`), files (`run`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from crossattention.data.vocabulary import tokenizer_from_json
from crossattention.recipes.feed_forward_view import feed_forward_view
from crossattention.recipes.recipe import Run
from crossattention.recipes.translator import Alignment, OnProgress, Prediction, Translator
from crossattention.recipes.translator_view import attention_view
from crossattention.views.content import AttentionView, FeedForwardView


@dataclass(frozen=True)
class TranslatorRun(Run):
    """A trained model with its two vocabularies.

    Args:
        path: the folder that holds the weights.
        recipe: "g2p" or "seq2seq".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        translator: the model and its vocabularies.
    """

    translator: Translator

    has_beams: ClassVar[bool] = True
    shows_feed_forward: ClassVar[bool] = True

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.translator.model

    def predict(
        self, inputs: Iterable[str], *, beams: int = 4, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Predict texts as they come; see `Translator.predict`."""
        texts = map(self.spelled, inputs)
        return self.translator.predict(texts, beams=beams, num_hypotheses=num_hypotheses, batch_size=batch_size)

    @abstractmethod
    def evaluate(self, *, beams: int = 1, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on its whole test part; `beams` is the width of the beam search, 1 is greedy."""

    @abstractmethod
    def training_pairs(self, count: int) -> list[tuple[str, str]]:
        """Some training pairs, always the same ones; none where the data cannot be had."""

    def sample_input(self) -> str:
        """The first of the training texts.

        Raises:
            ValueError: the data cannot be had.
        """
        pairs = self.training_pairs(1)
        if not pairs:
            raise ValueError("the run's data is not where it was, or has changed, so there is no text to look at; name one: TEXT")
        return pairs[0][0]

    def spelled(self, text: str) -> str:
        """A text as the model reads it."""
        return text

    def align(self, given: str, predicted: str) -> Alignment:
        """What each token of a prediction read of the text; see `Translator.align`."""
        return self.translator.align(self.spelled(given), predicted)

    def view(self, given: str, answer: str | None = None) -> AttentionView:
        """What a prediction read of a text, in every layer and head, for `views.pages.write_page` and `views.figures`.

        Args:
            given: the text that the model reads.
            answer: what it writes; without it, its own best prediction.

        Raises:
            ValueError: the text is empty, or the model writes nothing for it.
            UnknownSymbol: a symbol of the text or of the answer was never seen in training.
        """
        return attention_view(self.translator, *self._pair(given, answer))

    def feed_forward_view(
        self, given: str, answer: str | None = None, *, num_examples: int = 300, on_progress: OnProgress | None = None
    ) -> FeedForwardView:
        """Which keys of the decoder's feed-forward layers fire while a text is answered; Raises as in `view`.

        Args:
            given: the text that the model reads.
            answer: what it writes; without it, its own best prediction.
            num_examples: training texts among which those are looked for on which a key fires most.
            on_progress: called with the number of these that were read, and that of all.
        """
        examples = self.training_pairs(num_examples)
        note = f"Texts on which a key fires most are looked for among {len(examples)} training texts with the data's answers."
        if not examples:
            note = "The run's data is not where it was, or has changed, so no texts are shown on which a key fires."
        return feed_forward_view(self.translator, *self._pair(given, answer), examples, note=note, on_progress=on_progress)

    def _pair(self, text: str, answer: str | None) -> tuple[str, str]:
        """What the model reads of a text, and an answer to it: the one given, or its own."""
        if answer is None:
            [predictions] = self.predict([text])
            answer = predictions[0].text
        return self.spelled(text), answer


def open_translator(path: Path, description: Mapping[str, Any], model: Any) -> Translator:
    """The translator out of what `PairLearner.describe` wrote, and the model.

    Raises:
        KeyError, TypeError: the description lacks something.
        ValueError: it is damaged, or of another model.
    """
    try:
        source = tokenizer_from_json(description["source_tokenizer"])
        target = tokenizer_from_json(description["target_tokenizer"])
        max_length = int(description["max_length"])
    except ValueError as error:
        raise ValueError(f"{path / 'task.json'} is damaged or of another version: {error!r}; train again") from error
    sizes = (model.config.source_vocab_size, model.config.target_vocab_size)
    if sizes != (source.size, target.size):
        raise ValueError(
            f"the parts of {path} do not belong together: task.json has vocabularies of {source.size} and "
            f"{target.size} ids, config.json of {sizes[0]} and {sizes[1]}; take both from one run"
        )
    return Translator(model, source, target, max_length)

"""Runs: a trained model read back from its folder, to predict and to be scored.

What lives here: finding and checking the parts of a folder. What does not: writing it (`training`), what a recipe's
scores are (`g2p`, `seq2seq`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossattention.checkpoints.files import read_json
from crossattention.data.vocabulary import tokenizer_from_json
from crossattention.models.pretrained import bundled, load
from crossattention.recipes import g2p, seq2seq
from crossattention.recipes.feed_forward_view import feed_forward_view
from crossattention.recipes.translator import Alignment, OnProgress, Prediction, Translator
from crossattention.recipes.translator_view import attention_view
from crossattention.views.content import AttentionView, FeedForwardView

RECIPES = (g2p.RECIPE, seq2seq.RECIPE)

_PARTS = ("config.json", "model.safetensors", "task.json")


@dataclass(frozen=True)
class Run:
    """A trained model with all that its recipe needs.

    Args:
        path: the folder that holds the weights.
        recipe: "g2p" or "seq2seq".
        translator: the model and its vocabularies.
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
    """

    path: Path
    recipe: str
    translator: Translator
    description: Mapping[str, Any]
    step: int | None

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.translator.model

    def predict(
        self, texts: Iterable[str], *, beams: int = 4, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Predict texts as they come; see `Translator.predict`.

        For g2p a text is a word: small letters and capitals are the same, and the predictions carry IPA.
        """
        if self.recipe == g2p.RECIPE:
            texts = map(g2p.letters_of, texts)
        found = self.translator.predict(texts, beams=beams, num_hypotheses=num_hypotheses, batch_size=batch_size)
        if self.recipe == g2p.RECIPE:
            return ([g2p.with_ipa(prediction) for prediction in predictions] for predictions in found)
        return found

    def align(self, text: str, predicted: str) -> Alignment:
        """What each token of a prediction read of the text; see `Translator.align`."""
        return self.translator.align(g2p.letters_of(text) if self.recipe == g2p.RECIPE else text, predicted)

    def view(self, text: str, answer: str | None = None) -> AttentionView:
        """What a prediction read of a text, in every layer and head, for `views.pages.write_page` and `views.figures`.

        Args:
            text: what the model reads.
            answer: what it writes; without it, its own best prediction.

        Raises:
            ValueError: the text is empty, or the model writes nothing for it.
            UnknownSymbol: a symbol of the text or of the answer was never seen in training.
        """
        return attention_view(self.translator, *self._pair(text, answer))

    def feed_forward_view(
        self, text: str, answer: str | None = None, *, num_examples: int = 300, on_progress: OnProgress | None = None
    ) -> FeedForwardView:
        """Which keys of the decoder's feed-forward layers fire while a text is answered; Args and Raises as in `view`.

        Args:
            text: what the model reads.
            answer: what it writes; without it, its own best prediction.
            num_examples: training texts among which those are looked for on which a key fires most.
            on_progress: called with the number of these that were read, and that of all.
        """
        if self.recipe == g2p.RECIPE:
            stressed = g2p.config_from_json(self.description["config"]).stressed
            examples = g2p.training_pairs(stressed=stressed, count=num_examples)
        else:
            config = seq2seq.config_from_json(self.description["config"])
            examples = seq2seq.training_pairs(config, self.description["data"], count=num_examples)
        note = f"Texts on which a key fires most are looked for among {len(examples)} training texts with the data's answers."
        if not examples:
            note = "The run's data is not where it was, or has changed, so no texts are shown on which a key fires."
        return feed_forward_view(self.translator, *self._pair(text, answer), examples, note=note, on_progress=on_progress)

    def _pair(self, text: str, answer: str | None) -> tuple[str, str]:
        """What the model reads of a text, and an answer to it: the one given, or its own."""
        if answer is None:
            [predictions] = self.predict([text])
            answer = predictions[0].text
        return (g2p.letters_of(text) if self.recipe == g2p.RECIPE else text), answer


def load_run(folder: str | Path) -> Run:
    """Load the best model of a run.

    Args:
        folder: what `crossattention train` wrote (its `best` is taken), or a folder with config.json,
            model.safetensors and task.json itself; or the id of weights inside this package, as "g2p-small". A folder of
            that name comes first.

    Returns:
        The run, its model in evaluation mode on the CPU, in float32 whatever it is stored in.

    Raises:
        FileNotFoundError: there is no such folder, or a part of it is missing.
        ValueError: the folder is no run, has no model yet, or a part of it is damaged; the part is named.

    Cost: reads the weights once.
    """
    path = _find_model(Path(folder))
    description = _read_description(path)
    try:
        source = tokenizer_from_json(description["source_tokenizer"])
        target = tokenizer_from_json(description["target_tokenizer"])
        max_length = int(description["max_length"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'task.json'} is damaged or of another version: {error!r}; train again") from error
    model = load(path, dtype=torch.float32)  # half precision is how weights are stored, not how they are run
    sizes = (model.config.source_vocab_size, model.config.target_vocab_size)
    if sizes != (source.size, target.size):
        raise ValueError(
            f"the parts of {path} do not belong together: task.json has vocabularies of {source.size} and "
            f"{target.size} ids, config.json of {sizes[0]} and {sizes[1]}; take both from one run"
        )
    translator = Translator(model.eval(), source, target, max_length)
    return Run(path, description["recipe"], translator, description, _read_step(path))


def evaluate(run: Run, *, beams: int = 1, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Score a run on its whole test part, which training never saw.

    Args:
        run: what `load_run` gave.
        beams: width of the beam search; 1 is greedy.
        on_progress: called now and then with the number of examples that are predicted, and that of all.

    Returns:
        For g2p what `g2p.score_test_words` gives, for seq2seq what `seq2seq.score_pairs` gives.

    Raises:
        FileNotFoundError: a data file of the run is missing.
        ValueError: the data is not what the run was trained on.
    """
    if run.recipe == g2p.RECIPE:
        config = g2p.config_from_json(run.description["config"])
        then, now = run.description["data"]["sha256"], g2p.dictionary_sha256()
        if then != now:
            raise ValueError(
                f"{run.path} was trained on another edition of the dictionary (sha256 {then}, here {now}); scores "
                "would not be of unseen words: score it with the version of crossattention that trained it"
            )
        return g2p.score_test_words(run.translator, stressed=config.stressed, beams=beams, on_progress=on_progress)
    pairs_config = seq2seq.config_from_json(run.description["config"])
    seq2seq.check_files(pairs_config, run.description["data"])
    parts = seq2seq.read_parts(pairs_config)
    return seq2seq.score_pairs(run.translator, parts.test, pairs_config.metrics, beams=beams, on_progress=on_progress)


def _find_model(folder: Path) -> Path:
    """The folder that holds the weights of a run's folder, complete."""
    if not folder.exists() and str(folder) in bundled():
        return bundled()[str(folder)]
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(
            f"expected the folder of a run at {folder}, found {found}; `crossattention train g2p --out {folder}` makes one, "
            f"and inside this package there are: {', '.join(bundled()) or 'none'}"
        )
    path = folder / "best" if (folder / "best").is_dir() else folder
    present = [name for name in _PARTS if (path / name).is_file()]
    if "task.json" not in present and path == folder:
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"the run in {folder} has no model yet: its first evaluation writes one; go on with --resume")
        held = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} is no run: expected {', '.join(_PARTS)} in it or in its folder best, found {held}; "
            "`crossattention train` writes runs"
        )
    missing = [name for name in _PARTS if name not in present]
    if missing:
        raise FileNotFoundError(f"the run in {path} is not complete: {', '.join(missing)} missing; copy it whole")
    return path


def _read_description(path: Path) -> Mapping[str, Any]:
    description = read_json(path / "task.json")
    if not isinstance(description, dict) or description.get("recipe") not in RECIPES:
        named = description.get("recipe") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"expected a recipe among {', '.join(RECIPES)} in {path / 'task.json'}, got {named!r}")
    return description


def _read_step(path: Path) -> int | None:
    scores = path / "scores.json"
    found = read_json(scores).get("step") if scores.is_file() else None
    return found if isinstance(found, int) else None

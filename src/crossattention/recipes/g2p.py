"""The default recipe: how English words are pronounced, learned from the CMU dictionary of the package.

Letters to phonemes (grapheme to phoneme) with the 2017 Transformer. What lives here: the training and held-out words,
the defaults for five minutes on two cores, evaluation, the final scores. What does not: the dictionary (`cmudict`),
error rates (`scores`), batches and loss (`pair_task`).

Scores are on this package's own split by a hash of the word, of the current dictionary. They compare with nothing that
was published on the older PRONALSYL split; the one published figure on the current dictionary is a WER of 30.2 %
without stress (g2p-seq2seq's Transformer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from crossattention.data.batches import PairBatch
from crossattention.data.vocabulary import PAD, build_tokenizer
from crossattention.models.transformer import Transformer
from crossattention.recipes.cmudict import (
    Part,
    dictionary_sha256,
    has_stem_in,
    part_of,
    pronunciations_of,
    read_dictionary,
    to_ipa,
    without_stress,
)
from crossattention.recipes.pair_task import ModelShape, PairLearner
from crossattention.recipes.recipe import Examples
from crossattention.recipes.scores import PronunciationScores, score_pronunciations
from crossattention.recipes.translator import OnProgress, Prediction, Translator
from crossattention.recipes.translator_run import TranslatorRun, open_translator
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together

RECIPE = "g2p"

SAMPLE_WORD = "spaghetti"
"""A validation word, drawn at each evaluation: a silent letter, a doubled one, seven phonemes of nine letters."""

NEW_WORDS = ("zoomified", "blorkworthy", "crossattention")
"""Words to try that no dictionary has."""

WIDEST = 30
"""Cells of an answer in the table: a young model may stammer without end."""

SUBSETS: Mapping[str, str] = MappingProxyType(
    {
        "": "all",
        "_stem_seen": "a stem of the word was trained on",
        "_stem_unseen": "no stem was trained on",
        "_stressed": "all, stress counted",
    }
)
"""Which test words a score is of, by how its name ends."""

Words = Mapping[str, tuple[str, ...]]
"""Words with all their pronunciations."""


@dataclass(frozen=True)
class G2PConfig:
    """The settings of the recipe; the defaults are for five minutes on two cores.

    Args:
        stressed: learn the stress of vowels too (69 phonemes, where 39 are without it).
        evaluation_words: validation words scored at each evaluation, of 2,561.
        tokens_per_batch: letters and phonemes a step.
        label_smoothing: mass that the labels give to all other phonemes.
        model: size of the Transformer; without dropout, which costs more than it gives in the four epochs of five minutes.
    """

    stressed: bool = False
    evaluation_words: int = 500
    tokens_per_batch: int = 2048
    label_smoothing: float = 0.1
    model: ModelShape = field(default_factory=lambda: ModelShape(dropout=0.0))


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults: those that won in five minutes (dev/LOG.md)."""
    return TrainConfig(minutes=5, optimizer="muon", learning_rate=6e-3)


class G2PTask:
    """The training task: a `Task` of the training loop.

    Args:
        config: the recipe's settings.
        seed: of the batch order.

    Raises:
        ValueError: a setting out of range.

    Cost: one second, to read and encode the dictionary.
    """

    metric = "per"

    def __init__(self, config: G2PConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or G2PConfig()
        if self.config.evaluation_words < 1:
            raise ValueError(f"expected evaluation_words of at least 1, got {self.config.evaluation_words}")
        dictionary = words_by_part(stressed=self.config.stressed)
        self.held_out = _first_by_hash(dictionary["valid"], self.config.evaluation_words)
        self.sample_reference = dictionary["valid"][SAMPLE_WORD][0]
        pairs = [(word, phones) for word, found in dictionary["train"].items() for phones in found]
        self.learner = PairLearner(
            pairs,
            build_tokenizer("characters", (word for word, _ in pairs)),
            build_tokenizer("words", (phones for _, phones in pairs), strict=True),
            self.config.model,
            tokens_per_batch=self.config.tokens_per_batch,
            label_smoothing=self.config.label_smoothing,
            seed=seed,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: the dictionary is whole."""
        return ()

    @property
    def sample_input(self) -> str:
        """The word that is drawn at each evaluation."""
        return SAMPLE_WORD

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training pronunciation once."""
        return self.learner.steps_per_epoch

    def build_model(self) -> Transformer:
        """A new model with random weights."""
        return self.learner.build_model()

    def batch_at(self, step: int) -> PairBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.learner.batch_at(step)

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """The label-smoothed cross-entropy, mean over the phonemes, in nats."""
        return self.learner.loss(model, batch)

    def loss_weight(self, batch: PairBatch) -> float:
        """The number of phonemes, END counted."""
        return int((batch.labels != PAD).sum())

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """Error rates of greedy predictions on validation words, and one word to look at.

        The rates are of phonemes as they are learned, with stress where that is learned.
        """
        translator = self.learner.translator(model)
        predicted = [prediction.text for prediction in translator.predict_all(list(self.held_out), together=together)]
        scores = score_pronunciations(predicted, list(self.held_out.values()))
        metrics = {"per": scores.per, "wer": scores.wer, "per_macro": scores.per_macro}
        return Evaluation(metrics, sample_of(translator, SAMPLE_WORD, self.sample_reference) if together.is_first else None)

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        return {
            "recipe": RECIPE,
            "config": asdict(self.config),
            "data": {"name": "cmudict", "sha256": dictionary_sha256()},
            **self.learner.describe(),
        }

    def examples(self, run: G2PRun, count: int) -> Examples:
        """Test words with a run's answers, in phonemes and in IPA, and words that are in no dictionary."""
        words = unseen_words(run.translator, stressed=self.config.stressed, count=count)
        rows = [
            (word.predicted in word.references, (word.word, word.predicted, _spoken(word.ipa), " | ".join(word.references)))
            for word in words
        ]
        return Examples(("word", "model", "IPA", "dictionary"), tuple(rows), NEW_WORDS, answers=(1,), widest={1: WIDEST, 2: WIDEST})


@dataclass(frozen=True)
class G2PRun(TranslatorRun):
    """A trained model that pronounces words: small letters and capitals are the same, and the predictions carry IPA."""

    subsets: ClassVar[Mapping[str, str]] = SUBSETS

    def predict(
        self, inputs: Iterable[str], *, beams: int = 4, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Predict words as they come, with IPA; see `Translator.predict`."""
        found = super().predict(inputs, beams=beams, num_hypotheses=num_hypotheses, batch_size=batch_size)
        return ([with_ipa(prediction) for prediction in predictions] for predictions in found)

    def evaluate(self, *, beams: int = 1, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on all test words; Returns as `score_test_words`.

        Raises:
            ValueError: the run was trained on another edition of the dictionary.
        """
        then, now = self.description["data"]["sha256"], dictionary_sha256()
        if then != now:
            raise ValueError(
                f"{self.path} was trained on another edition of the dictionary (sha256 {then}, here {now}); scores "
                "would not be of unseen words: score it with the version of crossattention that trained it"
            )
        return score_test_words(self.translator, stressed=self._is_stressed, beams=beams, on_progress=on_progress)

    def training_pairs(self, count: int) -> list[tuple[str, str]]:
        """Some training words with their first pronunciations."""
        return training_pairs(stressed=self._is_stressed, count=count)

    def spelled(self, text: str) -> str:
        """A word as the dictionary spells it."""
        return letters_of(text)

    @property
    def _is_stressed(self) -> bool:
        return config_from_json(self.description["config"]).stressed


@dataclass(frozen=True)
class UnseenWord:
    """A test word with the model's answer beside the dictionary's."""

    word: str
    predicted: str
    ipa: str
    references: tuple[str, ...]


def config_from_json(fields: Mapping[str, Any]) -> G2PConfig:
    """The settings that a run's description holds."""
    return G2PConfig(**{**fields, "model": ModelShape(**fields["model"])})


@cache
def words_by_part(*, stressed: bool) -> Mapping[Part, Words]:
    """The dictionary's words with their pronunciations, in three parts by the hash of the word.

    Cost: one second the first time; kept, since a run needs it to train, to score and to show.
    """
    parts: dict[Part, dict[str, tuple[str, ...]]] = {"train": {}, "valid": {}, "test": {}}
    for word, found in pronunciations_of(read_dictionary(), stressed=stressed).items():
        parts[part_of(word)][word] = found
    return MappingProxyType({part: MappingProxyType(words) for part, words in parts.items()})


def letters_of(text: str) -> str:
    """A word as the dictionary spells it: in small letters, without spaces around it."""
    return text.strip().lower()


def with_ipa(prediction: Prediction) -> Prediction:
    """The prediction with its phonemes in IPA."""
    return replace(prediction, ipa=to_ipa(prediction.text))


def sample_of(translator: Translator, word: str, reference: str) -> dict[str, Any]:
    """One word to show: what is predicted, what is right, and what each phoneme read of the letters.

    Returns:
        source (the word), predicted and reference (ARPABET), ipa and reference_ipa, and the map: rows (phonemes),
        columns (letters), weights (rows x columns).
    """
    predicted = translator.predict_all([word])[0].text
    return {
        "source": word,
        "predicted": predicted,
        "ipa": to_ipa(predicted),
        "reference": reference,
        "reference_ipa": to_ipa(reference),
        **asdict(translator.align(word, predicted)),
    }


def unseen_words(translator: Translator, *, stressed: bool, count: int = 10) -> list[UnseenWord]:
    """Some test words, always the same ones, with the model's answers beside the dictionary's."""
    words = _first_by_hash(words_by_part(stressed=stressed)["test"], count)
    predictions = translator.predict_all(list(words))
    return [
        UnseenWord(word, prediction.text, to_ipa(prediction.text), references)
        for (word, references), prediction in zip(words.items(), predictions, strict=True)
    ]


def training_pairs(*, stressed: bool, count: int) -> list[tuple[str, str]]:
    """Some training words with their first pronunciations, always the same ones."""
    words = _first_by_hash(words_by_part(stressed=stressed)["train"], count)
    return [(word, pronunciations[0]) for word, pronunciations in words.items()]


def score_test_words(
    translator: Translator, *, stressed: bool, beams: int = 1, on_progress: OnProgress | None = None
) -> dict[str, float]:
    """Score a model on all test words.

    Args:
        translator: the model and its vocabularies.
        stressed: its phonemes carry stress.
        beams: width of the beam search; 1 is greedy.
        on_progress: called now and then with the number of words that are predicted, and that of all.

    Returns:
        words, wer, per, per_macro: without stress, so that all models compare; the same four with `_stem_seen` for the
        words of which a stem is a training word, with `_stem_unseen` for the others; for a model with stress also
        wer_stressed, per_stressed and per_macro_stressed. Rates are fractions of 1; per is the micro rate.

    Cost: 10,011 words: some 10 s greedily on one core.
    """
    parts = words_by_part(stressed=stressed)
    words = list(parts["test"])
    predicted = [prediction.text for prediction in translator.predict_all(words, beams=beams, on_progress=on_progress)]
    scores: dict[str, float] = {}
    if stressed:
        with_stress = score_pronunciations(predicted, list(parts["test"].values()))
        scores = {f"{name}_stressed": value for name, value in _rates(with_stress).items()}
    plain = {
        word: (without_stress(phones), [without_stress(reference) for reference in parts["test"][word]])
        for word, phones in zip(words, predicted, strict=True)
    }
    seen = {word for word in words if has_stem_in(word, parts["train"])}
    return {
        **_scores_of(words, plain, ""),
        **_scores_of([word for word in words if word in seen], plain, "_stem_seen"),
        **_scores_of([word for word in words if word not in seen], plain, "_stem_unseen"),
        **scores,
    }


def _scores_of(words: Sequence[str], plain: Mapping[str, tuple[str, list[str]]], suffix: str) -> dict[str, float]:
    scores = score_pronunciations([plain[word][0] for word in words], [plain[word][1] for word in words])
    return {f"{name}{suffix}": value for name, value in {"words": scores.words, **_rates(scores)}.items()}


def _rates(scores: PronunciationScores) -> dict[str, float]:
    return {"wer": scores.wer, "per": scores.per, "per_macro": scores.per_macro}


def _first_by_hash(words: Words, count: int) -> dict[str, tuple[str, ...]]:
    """Some of the words, the same ones whatever else the dictionary holds, not the first of the alphabet."""
    chosen: Iterable[str] = sorted(words, key=lambda word: hashlib.blake2b(word[::-1].encode()).digest())[:count]
    return {word: words[word] for word in chosen}


def _spoken(ipa: str) -> str:
    """IPA between its strokes; nothing where there is none."""
    return f"/{ipa}/" if ipa else ""


CONFIG, TASK = G2PConfig, G2PTask


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> G2PRun:
    """A run out of its parts."""
    return G2PRun(path, RECIPE, description, step, open_translator(path, description, model))

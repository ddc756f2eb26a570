"""The general recipe: any two-column file, one side to be written from the other.

What lives here: the parts of a file (by a hash of the source, or given), the tokenizers of each side, evaluation by
the metrics asked for. What does not: reading files (`data.pairs`), batches and loss (`pair_task`), metrics (`scores`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from crossattention.checkpoints.files import sha256_of
from crossattention.data.batches import PairBatch
from crossattention.data.pairs import read_pairs
from crossattention.data.vocabulary import PAD, Tokenizer, TokenizerKind, UnknownSymbol, WordTokenizer, build_tokenizer
from crossattention.models.transformer import Transformer
from crossattention.recipes.pair_task import ModelShape, PairLearner
from crossattention.recipes.recipe import Examples
from crossattention.recipes.scores import LOWER_IS_BETTER, TextMetric, check_text_metrics, score_texts
from crossattention.recipes.translator import OnProgress, Translator
from crossattention.recipes.translator_run import TranslatorRun, open_translator
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together

RECIPE = "seq2seq"

HELD_OUT_SHARE = 0.05
"""The share of all sources that validation and test each take of `data`, where no file is given for them."""

_DEFAULT_BPE_SIZE = 8000

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The settings of the recipe.

    Args:
        data: two-column file: TSV, CSV, JSONL or Parquet.
        valid: file of validation pairs; without it 5 % of `data`, by a hash of the source.
        test: file of test pairs; without it 5 % of `data`, by a hash of the source.
        skip_bad: leave bad lines out and count them, where otherwise the first of them is an error.
        source_tokens: what the sources are cut into.
        target_tokens: what the targets are cut into.
        vocabulary_size: ids of each side that is cut into bpe (without it 8,000) or words (without it all, of the
            sources those that occur more than once).
        metrics: scores of held-out predictions; the first error rate among them decides which model is the best,
            without one the cross-entropy of the validation pairs.
        evaluation_pairs: validation pairs scored at each evaluation.
        tokens_per_batch: padded source and target tokens a step.
        label_smoothing: mass that the labels give to all other tokens.
        model: size of the Transformer.
    """

    data: Path
    valid: Path | None = None
    test: Path | None = None
    skip_bad: bool = False
    source_tokens: TokenizerKind = "characters"
    target_tokens: TokenizerKind = "characters"
    vocabulary_size: int | None = None
    metrics: tuple[TextMetric, ...] = ("cer", "wer", "exact")
    evaluation_pairs: int = 300
    tokens_per_batch: int = 4096
    label_smoothing: float = 0.1
    model: ModelShape = field(default_factory=ModelShape)

    def __post_init__(self) -> None:
        check_text_metrics(self.metrics)
        if self.evaluation_pairs < 1:
            raise ValueError(f"expected evaluation_pairs of at least 1, got {self.evaluation_pairs}")
        kinds = (self.source_tokens, self.target_tokens)
        if self.vocabulary_size is not None and kinds == ("characters", "characters"):
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} has no use where both sides are characters; leave it out, or "
                "choose words or bpe for a side"
            )


@dataclass(frozen=True)
class Parts:
    """The pairs of each part, the number of bad lines left out, and the first of these."""

    train: Pairs
    valid: Pairs
    test: Pairs
    skipped: int = 0
    problems: tuple[str, ...] = ()


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults."""
    return TrainConfig(minutes=5, learning_rate=2e-3)


def read_parts(config: Seq2SeqConfig) -> Parts:
    """Read the files and divide the pairs.

    One source never stands on two sides of `data`: its part follows from a hash of it. Files given for validation and
    test are taken whole; of `data`, pairs whose source stands in such a file are not trained on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as `read_pairs`; a part is empty.
    """
    main = read_pairs(config.data, skip_bad=config.skip_bad)
    given = {
        name: read_pairs(path, skip_bad=config.skip_bad)
        for name, path in (("valid", config.valid), ("test", config.test))
        if path is not None
    }
    found: dict[str, Pairs] = {"train": [], "valid": [], "test": []}
    reserved = {source for file in given.values() for source, _ in file.pairs}
    for source, target in main.pairs:
        part = _part_of(source, {"valid", "test"} - set(given))
        if part != "train" or source not in reserved:
            found[part].append((source, target))
    for name, file in given.items():
        found[name] = file.pairs
    for name, pairs in found.items():
        if not pairs:
            raise ValueError(
                f"the {name} part of {config.data} is empty: {len(main.pairs)} pairs are too few to divide; give more "
                "pairs, or files of their own for validation and test (--valid, --test)"
            )
    files = [main, *given.values()]
    problems = tuple(f"{file.path}, {problem}" for file in files for problem in file.problems)
    return Parts(**found, skipped=sum(file.skipped for file in files), problems=problems)


class Seq2SeqTask:
    """The training task: a `Task` of the training loop.

    Args:
        config: the recipe's settings.
        seed: of the batch order.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a bad line or an empty part (see `read_parts`), a pair longer than a batch may be, no validation
            pair in symbols that the training part has.
        ModuleNotFoundError: a library of the `data` extra is needed and missing.
    """

    def __init__(self, config: Seq2SeqConfig, *, seed: int = 0) -> None:
        self.config = config
        self.parts = read_parts(config)
        self.learner = PairLearner(
            self.parts.train,
            _source_tokenizer(config, [source for source, _ in self.parts.train]),
            _tokenizer(config.target_tokens, config.vocabulary_size, [target for _, target in self.parts.train]),
            config.model,
            tokens_per_batch=config.tokens_per_batch,
            label_smoothing=config.label_smoothing,
            seed=seed,
        )
        self.held_out = sorted(self.parts.valid, key=lambda pair: _digest(pair[0]))[: config.evaluation_pairs]
        self.readable = [pair for pair in self.held_out if self._can_encode(pair)]
        if not self.readable:
            raise ValueError(
                f"none of {len(self.held_out)} validation pairs is in symbols that the training part has; "
                "give more training pairs, or cut both sides into bpe"
            )

    @property
    def metric(self) -> str:
        """The number to make small: the first error rate among the metrics, else the cross-entropy."""
        return next((metric for metric in self.config.metrics if LOWER_IS_BETTER[metric]), "loss")

    @property
    def notes(self) -> tuple[str, ...]:
        """How many bad lines were left out, if any, and the first of them."""
        if not self.parts.skipped:
            return ()
        return (f"bad lines left out: {self.parts.skipped:,}, such as {self.parts.problems[0]}",)

    @property
    def sample_input(self) -> str:
        """The text that is drawn at each evaluation."""
        return self.readable[0][0]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training pair once."""
        return self.learner.steps_per_epoch

    def build_model(self) -> Transformer:
        """A new model with random weights."""
        return self.learner.build_model()

    def batch_at(self, step: int) -> PairBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.learner.batch_at(step)

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """The label-smoothed cross-entropy, mean over the target tokens, in nats."""
        return self.learner.loss(model, batch)

    def loss_weight(self, batch: PairBatch) -> float:
        """The number of target tokens, END counted."""
        return int((batch.labels != PAD).sum())

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """The cross-entropy and the metrics of greedy predictions of validation pairs, and one pair to look at."""
        translator = self.learner.translator(model)
        scores = score_pairs(translator, self.held_out, self.config.metrics, together=together)
        loss = self.learner.held_out_loss(model, self.readable, together)
        metrics = {"loss": loss, **{metric: scores[metric] for metric in self.config.metrics}}
        return Evaluation(metrics, sample_of(translator, *self.readable[0]) if together.is_first else None)

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        return {
            "recipe": RECIPE,
            "config": _config_to_json(self.config),
            "data": {str(path): sha256_of(path) for path in _files(self.config)},
            **self.learner.describe(),
        }

    def examples(self, run: Seq2SeqRun, count: int) -> Examples:
        """The first test pairs with a run's answers."""
        pairs = self.parts.test[:count]
        predictions = run.translator.predict_all([source for source, _ in pairs])
        rows = [
            (found.text == target, (source, found.text, target)) for (source, target), found in zip(pairs, predictions, strict=True)
        ]
        return Examples(("source", "model", "data"), tuple(rows), (pairs[0][0],), answers=(1,))

    def _can_encode(self, pair: tuple[str, str]) -> bool:
        try:
            self.learner.encoded([pair])
        except UnknownSymbol:
            return False
        return True


@dataclass(frozen=True)
class Seq2SeqRun(TranslatorRun):
    """A trained model of the user's pairs."""

    def evaluate(self, *, beams: int = 1, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on its test pairs; Returns as `score_pairs`, Raises as `check_files`."""
        config = config_from_json(self.description["config"])
        check_files(config, self.description["data"])
        return score_pairs(self.translator, read_parts(config).test, config.metrics, beams=beams, on_progress=on_progress)

    def training_pairs(self, count: int) -> Pairs:
        """Some training pairs; none where the files are not those that the run was trained on."""
        return training_pairs(config_from_json(self.description["config"]), self.description["data"], count=count)


def score_pairs(
    translator: Translator,
    pairs: Pairs,
    metrics: Sequence[TextMetric],
    *,
    beams: int = 1,
    on_progress: OnProgress | None = None,
    together: Together = ALONE,
) -> dict[str, float]:
    """Predict held-out sources and score the predictions; `on_progress` and `together` as in `Translator.predict_all`.

    Returns:
        Each metric; `pairs`, how many; `unreadable`, how many sources have a symbol never seen in training: these
        count as predicted empty.
    """
    sources, targets = zip(*pairs, strict=True)
    predictions = translator.predict_all(sources, beams=beams, on_progress=on_progress, together=together)
    scores = score_texts([prediction.text for prediction in predictions], targets, metrics)
    unreadable = sum(prediction.log_probability == float("-inf") for prediction in predictions)
    return {**scores, "pairs": len(pairs), "unreadable": unreadable}


def sample_of(translator: Translator, source: str, reference: str) -> dict[str, Any]:
    """One pair to show: what is predicted, what is right, and what each predicted token read of the source.

    Returns:
        source, predicted, reference, and the map: rows, columns, weights (rows x columns).
    """
    predicted = translator.predict_all([source])[0].text
    alignment = asdict(translator.align(source, predicted))
    return {"source": source, "predicted": predicted, "reference": reference, **alignment}


def config_from_json(fields: Mapping[str, Any]) -> Seq2SeqConfig:
    """The settings that a run's description holds."""
    paths = {name: None if fields[name] is None else Path(fields[name]) for name in ("data", "valid", "test")}
    model = ModelShape(**fields["model"])
    return Seq2SeqConfig(**{**fields, **paths, "metrics": tuple(fields["metrics"]), "model": model})


def check_files(config: Seq2SeqConfig, digests: Mapping[str, str]) -> None:
    """Check that the files of a run are those that it was trained on.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one has changed.
    """
    for path in _files(config):
        if not path.is_file():
            raise FileNotFoundError(f"expected the data of the run at {path}, found nothing; put it back to score")
        now, then = sha256_of(path), digests.get(str(path))
        if now != then:
            raise ValueError(
                f"{path} has changed since the run was trained: expected sha256 {then}, got {now}; with other data, "
                "pairs that were trained on may be scored as unseen"
            )


def training_pairs(config: Seq2SeqConfig, digests: Mapping[str, str], *, count: int) -> Pairs:
    """Some training pairs, always the same ones; none where the files are not those that the run was trained on.

    Args:
        config: the run's.
        digests: the SHA-256 of each file then.
        count: the most pairs.
    """
    try:
        check_files(config, digests)
    except (OSError, ValueError):
        return []
    return sorted(read_parts(config).train, key=lambda pair: _digest(pair[0]))[:count]


def _config_to_json(config: Seq2SeqConfig) -> dict[str, Any]:
    paths = {name: None if path is None else str(path) for name, path in _named_files(config).items()}
    return {**asdict(config), **paths, "metrics": list(config.metrics)}


def _named_files(config: Seq2SeqConfig) -> dict[str, Path | None]:
    return {"data": config.data, "valid": config.valid, "test": config.test}


def _files(config: Seq2SeqConfig) -> list[Path]:
    return [path for path in _named_files(config).values() if path is not None]


def _digest(source: str) -> bytes:
    return hashlib.blake2b(source.encode("utf-8"), digest_size=8).digest()


def _part_of(source: str, to_divide: set[str]) -> str:
    """The part of a source; `to_divide` names those that are taken from the data at all."""
    place = int.from_bytes(_digest(source), "big") / 2**64
    part = "valid" if place < HELD_OUT_SHARE else "test" if place < 2 * HELD_OUT_SHARE else "train"
    return part if part in to_divide else "train"


def _source_tokenizer(config: Seq2SeqConfig, texts: list[str]) -> Tokenizer:
    """The tokenizer of the sources, which never gives UNKNOWN to a model that has not learned to read it.

    Words that occur only once become UNKNOWN, so that it is trained; where there is none, an unseen word is an error.
    """
    tokenizer = _tokenizer(config.source_tokens, config.vocabulary_size, texts)
    if not isinstance(tokenizer, WordTokenizer):
        return tokenizer
    counts = Counter(word for text in texts for word in text.split())
    often = [word for word in tokenizer.symbols if counts[word] > 1]
    return WordTokenizer(often, strict=len(often) == len(counts))


def _tokenizer(kind: TokenizerKind, size: int | None, texts: list[str]) -> Tokenizer:
    if kind == "characters":
        return build_tokenizer(kind, texts)
    return build_tokenizer(kind, texts, size=_DEFAULT_BPE_SIZE if kind == "bpe" and size is None else size)


CONFIG, TASK = Seq2SeqConfig, Seq2SeqTask


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> Seq2SeqRun:
    """A run out of its parts."""
    return Seq2SeqRun(path, RECIPE, description, step, open_translator(path, description, model))

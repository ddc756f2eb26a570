"""Questions about pictures: the words of a question read the patches of a picture, and answer it.

BERT with cross-attention on easy-vqa: 48,248 questions about 5,000 pictures of one coloured shape each, with 13 answers. What lives
here: the parts, the defaults for less than ten minutes on two cores, evaluation, the final scores. What does not: the data's files
(`data.easy_vqa`), the model (`models.picture_reader`), batches and what words read (`picture_questions`).

Four of five questions are of yes or no, and most of these can be guessed: whoever never looks at a picture and gives each
question's commonest answer of the training part is right on 66.9 % of the test part. So scores are given for shapes and colours
(guessed: 23.1 %) and for yes and no (82.5 %) apart.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crossattention.data.easy_vqa import YES_NO, EasyVQA, Part, Question, hold_out, load_easy_vqa, read_picture, words_of
from crossattention.data.vocabulary import BEGIN, END, PAD, WordTokenizer, build_tokenizer, tokenizer_from_json
from crossattention.models.bert import BertConfig
from crossattention.models.picture_reader import PictureReader, PictureReaderConfig
from crossattention.recipes.picture_questions import (
    CLS,
    Answerer,
    QuestionBatch,
    Questions,
    Reading,
    answer_loss,
    reading_of,
    reading_together,
)
from crossattention.recipes.pictures import PictureMap, Prediction, png_of
from crossattention.recipes.recipe import Examples, OnProgress, Run
from crossattention.training.config import TrainConfig
from crossattention.training.tasks import Evaluation
from crossattention.training.together import ALONE, Together
from crossattention.views.content import AttentionLayer, AttentionView, ImageSide, TextSide

RECIPE = "vqa"

SUBSETS = MappingProxyType({"": "all", "_shape_color": "answered by a shape or a color", "_yes_no": "answered by yes or no"})

_TOGETHER = 256  # questions that are answered at once


@dataclass(frozen=True)
class ReaderShape:
    """The size of the model.

    Args:
        dim: width of words and patches.
        heads: attention heads; divides dim.
        layers: layers of the decoder; each reads the picture.
        feed_forward_dim: inner width of the feed-forward layers.
        channels: widths of the convolutions before the last; each halves the picture, and so does the last: two of them make
            patches of 8 x 8 pixels.
        dropout: of embeddings and of each sub-layer's output.
    """

    dim: int = 64
    heads: int = 4
    layers: int = 2
    feed_forward_dim: int = 256
    channels: tuple[int, ...] = (16, 32)
    dropout: float = 0.0


@dataclass(frozen=True)
class VQAConfig:
    """The settings of the recipe; the defaults are for eight minutes on two cores.

    Args:
        data: a folder of easy-vqa or of its layout (answers.txt, train and test with questions.json and images); without it an
            installed package easy_vqa, else what was fetched before, else it is fetched by pip.
        held_out: share of the training pictures that is kept for validation, with their questions.
        evaluation_questions: validation questions scored at each evaluation, at most as many as there are.
        batch_size: questions a step.
        model: size of the model.
    """

    data: Path | None = None
    held_out: float = 0.1
    evaluation_questions: int = 1000
    batch_size: int = 64
    model: ReaderShape = field(default_factory=ReaderShape)

    def __post_init__(self) -> None:
        for name in ("evaluation_questions", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out between 0 and 1, got {self.held_out}")


def default_training() -> TrainConfig:
    """The training settings that go with the recipe's defaults (dev/LOG.md)."""
    return TrainConfig(minutes=8, learning_rate=2e-3, warmup_steps=200)


class VQATask:
    """The training task: a `RecipeTask`.

    Args:
        config: the recipe's settings.
        seed: of the batch order.

    Raises:
        FileNotFoundError, ConnectionError, ValueError, ModuleNotFoundError: as `load_easy_vqa`; a setting out of range; an
            answer of several words.

    Cost: two seconds to read and decode the pictures.
    """

    metric = "loss"

    def __init__(self, config: VQAConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or VQAConfig()
        self.data = load_easy_vqa(self.config.data, say=_say)
        train, valid = hold_out(self.data.train, self.config.held_out)
        several = next((answer for answer in self.data.answers if [answer] != words_of(answer)), None)
        if several is not None:
            raise ValueError(f"expected answers of one word in small letters, got {several!r}; write light-blue for light blue")
        texts = [*(" ".join(words_of(question.text)) for question in self.data.train.questions), *self.data.answers]
        self.tokenizer = build_tokenizer("words", texts, strict=True)
        self.train = Questions(train, self.tokenizer, self.data.answers, seed=seed)
        self.valid = Questions(valid, self.tokenizer, self.data.answers)
        self.choices = [self.tokenizer.encode(answer)[0] for answer in self.data.answers]
        self.asked = _evenly(len(self.valid), self.config.evaluation_questions)
        self.sample = next((q for q in valid.questions if q.answer not in YES_NO), valid.questions[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the data is."""
        counts = [
            f"{len(part.questions):,} questions about {len(part.images):,} pictures" for part in (self.data.train, self.data.test)
        ]
        return (f"{self.data.folder}: {counts[0]} to learn from, {counts[1]} to be scored on",)

    @property
    def sample_input(self) -> tuple[str, str]:
        """A validation picture and a question about it."""
        return str(self.picture_path("train", self.valid.part, self.sample)), self.sample.text

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training question once."""
        return self.train.steps_per_epoch(self.config.batch_size)

    def build_model(self) -> PictureReader:
        """A new model with random weights."""
        shape = self.config.model
        height, width = self.data.train.images.shape[1:3]
        longest = max(len(words_of(question.text)) for question in self.data.train.questions)
        decoder = BertConfig(
            self.tokenizer.size,
            dim=shape.dim,
            layers=shape.layers,
            heads=shape.heads,
            feed_forward_dim=shape.feed_forward_dim,
            max_length=longest + 1,
            type_vocab_size=1,
            dropout=shape.dropout,
            attention_dropout=0.0,
            context_dim=shape.dim,
            pad_id=PAD,
            begin_id=BEGIN,
            end_id=END,
        )
        return PictureReader(PictureReaderConfig(height, width, shape.channels, decoder))

    def batch_at(self, step: int) -> QuestionBatch:
        """The batch of a step, a pure function of (seed, step)."""
        return self.train.batch_at(step, self.config.batch_size)

    def loss(self, model: nn.Module, batch: QuestionBatch) -> Tensor:
        """The cross-entropy of the answer, mean over the words, in nats."""
        return answer_loss(model, batch, self.choices)

    def loss_weight(self, batch: QuestionBatch) -> float:
        """The number of words, BEGIN counted."""
        return batch.num_tokens

    def evaluate(self, model: nn.Module, together: Together = ALONE) -> Evaluation:
        """The cross-entropy and the accuracy on validation questions, and one question with what its words read, all together."""
        answerer = self.answerer(model)

        def answer(begin: int) -> tuple[Tensor, Tensor]:
            batch = self.valid.batch(self.asked[begin : begin + _TOGETHER])
            return answerer.predict(batch), batch.answers

        found = together.map(answer, range(0, len(self.asked), _TOGETHER))
        log, answers = (torch.cat(parts) for parts in zip(*found, strict=True))
        loss = float(-log.gather(1, answers[:, None]).mean())
        metrics = {"loss": loss, **_accuracies(log.argmax(1), answers, self.data.answers)}
        return Evaluation(metrics, self._sample_of(answerer) if together.is_first else None)

    def describe(self) -> dict[str, Any]:
        """What a run's folder holds beside the weights, for JSON."""
        config = asdict(self.config)
        config["data"] = None if self.config.data is None else str(self.config.data)
        config["model"]["channels"] = list(self.config.model.channels)
        return {
            "recipe": RECIPE,
            "config": config,
            "data": {"name": "easy-vqa", "sha256": self.data.sha256},
            "tokenizer": self.tokenizer.to_json(),
            "answers": list(self.data.answers),
        }

    def examples(self, run: VQARun, count: int) -> Examples:
        """Some test questions with a run's answers, every second one about a shape or a colour."""
        questions = self.data.test.questions
        open_ones = [q for q in questions if q.answer not in YES_NO]
        closed = [q for q in questions if q.answer in YES_NO]
        chosen = [*_spread(open_ones, count - count // 2), *_spread(closed, count // 2)]
        rows = []
        for question in chosen:
            [found] = run.answerer.ask(self.data.test.images[question.image], question.text)
            name = f"{self.data.test.image_numbers[question.image]}.png"
            rows.append((found.text == question.answer, (name, question.text, found.text, question.answer)))
        to_ask = (str(self.picture_path("test", self.data.test, chosen[0])), chosen[0].text)
        return Examples(("picture", "question", "model", "data"), tuple(rows), to_ask, answers=(2,))

    def answerer(self, model: nn.Module) -> Answerer:
        """The model with its vocabulary."""
        return Answerer(model, self.tokenizer, self.data.answers)

    def picture_path(self, part_name: str, part: Part, question: Question) -> Path:
        """The file of a question's picture."""
        return self.data.folder / part_name / "images" / f"{part.image_numbers[question.image]}.png"

    def _sample_of(self, answerer: Answerer) -> dict[str, Any]:
        image = self.valid.part.images[self.sample.image]
        [found] = answerer.ask(image, self.sample.text)
        read = read_map(answerer, image, self.sample.text)
        return {"source": self.sample.text, "predicted": found.text, "reference": self.sample.answer, **asdict(read)}


def read_map(answerer: Answerer, image: np.ndarray, question: str) -> PictureMap:
    """What the words of a question read of a picture, all together; Raises as `Answerer.encode`."""
    config = answerer.model.config
    weights = answerer.maps(answerer.batch_of(image, question))[:, 0, :, 1:].mean(dim=(0, 1, 2)).reshape(config.grid)
    rows, columns = ([str(config.patch * place) for place in range(count)] for count in config.grid)
    return PictureMap(rows, columns, [[round(weight, 4) for weight in row] for row in weights.tolist()])


@dataclass(frozen=True)
class VQARun(Run):
    """A trained model that answers questions about pictures.

    Args:
        path: the folder that holds the weights.
        recipe: "vqa".
        description: what the recipe wrote of itself beside the weights.
        step: the training step of the weights, where the folder says it.
        answerer: the model with its vocabulary.
    """

    answerer: Answerer

    input_names: ClassVar[tuple[str, ...]] = ("PICTURE", "QUESTION")
    subsets: ClassVar[Mapping[str, str]] = SUBSETS

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.answerer.model

    def predict(
        self, inputs: Iterable[tuple[str, str]], *, num_hypotheses: int = 1, batch_size: int = 32
    ) -> Iterator[list[Prediction]]:
        """Answer (picture, question) as they come, one after the other; `batch_size` changes nothing.

        Raises:
            ValueError: at once: `num_hypotheses` is not from 1 to the number of answers; while iterating: a picture that cannot be
                read or is of another size than those of the training, a question without a word or too long.
            UnknownSymbol: while iterating: a word that was never seen in training.
            FileNotFoundError: while iterating: there is no such picture.
        """
        most = len(self.answerer.answers)
        if not 1 <= num_hypotheses <= most:
            raise ValueError(f"expected 1 to {most} answers, as many as there are, got {num_hypotheses}")
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        return self._predict_lazily(inputs, num_hypotheses)

    def _predict_lazily(self, inputs: Iterable[tuple[str, str]], num_hypotheses: int) -> Iterator[list[Prediction]]:
        for given in inputs:
            yield self.answerer.ask(*self._read(given), num_hypotheses=num_hypotheses)

    def align(self, given: tuple[str, str], predicted: str) -> PictureMap:
        """What the question reads of the picture, all words together; the answer plays no part in it."""
        return read_map(self.answerer, *self._read(given))

    def view(self, given: tuple[str, str], answer: str | None = None) -> AttentionView:
        """Which patches of the picture each word of the question reads, in every layer and head.

        Args:
            given: the picture's file and the question.
            answer: not taken: what the words read does not depend on it.

        Raises:
            ValueError: an answer is given; as `predict`.
        """
        if answer is not None:
            raise ValueError(f"what a question reads does not depend on an answer, got {answer!r}; leave --answer out")
        image, question = self._read(given)
        [found] = self.answerer.ask(image, question)
        maps = self.answerer.maps(self.answerer.batch_of(image, question))[:, 0]
        layers = tuple(
            AttentionLayer.of_weights(f"decoder.layers.{index}.cross_attention", "cross-attention", weights.numpy())
            for index, weights in enumerate(maps)
        )
        config = self.model.config
        picture = ImageSide(png_of(image), *config.grid)
        title = f"{question} → {found.text} ({100 * found.probability:.1f} %)"
        return AttentionView(title, TextSide((CLS, *words_of(question))), picture, layers)

    def evaluate(self, *, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Score the run on the official test part.

        Returns:
            questions, accuracy, accuracy_from_question (a guess from the question alone), attention_on_shape (share of the words'
            attention on patches that hold the drawn shape, mean of layers and heads), attention_best_head (the same of the head
            with the most), attention_if_even (that of attention spread evenly): of all questions, with `_shape_color` of those
            answered by a shape or colour, with `_yes_no` of the others.

        Raises:
            FileNotFoundError, ConnectionError: the data cannot be had.
            ValueError: the data is not what the run was trained on.
        """
        config = config_from_json(self.description["config"])
        data = load_easy_vqa(config.data, say=_say)
        then = self.description["data"]["sha256"]
        if data.sha256 != then:
            raise ValueError(
                f"{self.path} was trained on other data (sha256 {then}) than {data.folder} holds ({data.sha256}); scores would not "
                "be of unseen pictures: give the folder it was trained on, or train again"
            )
        return score_test_questions(self.answerer, data, on_progress=on_progress)

    def _read(self, given: tuple[str, str]) -> tuple[np.ndarray, str]:
        path, question = given
        self.answerer.encode(question)  # the cheaper fault first
        return self.answerer.check_picture(read_picture(path), path), question


def score_test_questions(answerer: Answerer, data: EasyVQA, *, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Score a model on all test questions; Returns as `VQARun.evaluate`."""
    questions = Questions(data.test, answerer.tokenizer, data.answers)
    found = []
    for batch in questions.batches(_TOGETHER):
        found.append(answerer.predict(batch).argmax(1))
        if on_progress is not None:
            on_progress(batch.indices[-1] + 1, len(questions))
    predicted = torch.cat(found)
    guessed = torch.tensor([data.answers.index(answer) for answer in guesses(data.train.questions, data.test.questions)])
    subsets = {suffix: chosen for suffix, chosen in _subsets(questions.answers, data.answers).items() if bool(chosen.any())}
    read = {suffix: _read(answerer, questions, chosen) for suffix, chosen in subsets.items() if suffix}
    read[""] = reading_together({read[suffix]: int(subsets[suffix].sum()) for suffix in read})
    scores: dict[str, float] = {}
    for suffix, chosen in subsets.items():
        values = {
            "questions": int(chosen.sum()),
            "accuracy": _share(predicted[chosen] == questions.answers[chosen]),
            "accuracy_from_question": _share(guessed[chosen] == questions.answers[chosen]),
            "attention_on_shape": read[suffix].mean,
            "attention_best_head": float(read[suffix].heads.max()),
            "attention_if_even": read[suffix].even,
        }
        scores |= {f"{name}{suffix}": value for name, value in values.items()}
    return scores


def guesses(seen: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """The answer that each question had most often, whatever the picture; of an unseen question the commonest answer of all.

    Example:
        >>> seen = [Question("red?", "no", 0), Question("red?", "no", 1), Question("red?", "yes", 2)]
        >>> guesses(seen, [Question("red?", "yes", 0), Question("blue?", "yes", 0)])
        ['no', 'no']
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for question in seen:
        by_text[question.text][question.answer] += 1
    of_all = sum(by_text.values(), Counter())
    return [_commonest(by_text.get(question.text, of_all)) for question in asked]


def config_from_json(fields: Mapping[str, Any]) -> VQAConfig:
    """The settings that a run's description holds."""
    model = ReaderShape(**{**fields["model"], "channels": tuple(fields["model"]["channels"])})
    data = None if fields["data"] is None else Path(fields["data"])
    return VQAConfig(**{**fields, "data": data, "model": model})


def open_run(path: Path, description: Mapping[str, Any], model: Any, step: int | None) -> VQARun:
    """A run out of its parts."""
    try:
        tokenizer = tokenizer_from_json(description["tokenizer"])
    except ValueError as error:
        raise ValueError(f"{path / 'task.json'} is damaged or of another version: {error!r}; train again") from error
    answers = tuple(description["answers"])
    if not isinstance(tokenizer, WordTokenizer) or not isinstance(model, PictureReader):
        raise ValueError(f"the parts of {path} are not those of a run of {RECIPE}: it has words and a picture reader; train again")
    size = model.config.decoder.vocab_size
    unknown = set(answers) - set(tokenizer.symbols)
    if tokenizer.size != size or unknown:
        raise ValueError(
            f"the parts of {path} do not belong together: task.json has a vocabulary of {tokenizer.size} ids "
            f"({len(unknown)} of its answers not among them), config.json of {size}; take both from one run"
        )
    return VQARun(path, RECIPE, description, step, Answerer(model, tokenizer, answers))


def _read(answerer: Answerer, questions: Questions, chosen: Tensor) -> Reading:
    places = chosen.nonzero().flatten().tolist()
    return reading_of(answerer, (questions.batch(places[i : i + _TOGETHER]) for i in range(0, len(places), _TOGETHER)))


def _accuracies(predicted: Tensor, right: Tensor, answers: Sequence[str]) -> dict[str, float]:
    subsets = {f"accuracy{suffix}": chosen for suffix, chosen in _subsets(right, answers).items() if bool(chosen.any())}
    return {name: _share(predicted[chosen] == right[chosen]) for name, chosen in subsets.items()}


def _subsets(right: Tensor, answers: Sequence[str]) -> dict[str, Tensor]:
    is_yes_no = torch.tensor([answer in YES_NO for answer in answers])[right]
    return {"": torch.ones_like(is_yes_no), "_shape_color": ~is_yes_no, "_yes_no": is_yes_no}


def _share(is_right: Tensor) -> float:
    return float(is_right.double().mean())


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _evenly(count: int, most: int) -> list[int]:
    """At most so many places among `count`, spread over all of them."""
    return [index * count // min(most, count) for index in range(min(most, count))]


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    return [questions[place] for place in _evenly(len(questions), count)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


CONFIG, TASK = VQAConfig, VQATask

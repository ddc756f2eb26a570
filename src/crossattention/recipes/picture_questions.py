"""Questions about pictures as numbers: batches, answers, and what each word reads of the picture.

What lives here: all that needs the model and its vocabulary, whatever the pictures show. What does not: where they come from,
training settings, scores (`vqa`).

Legend: z batch, n length of the question with [CLS] before it, m patches, h heads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossattention.data.easy_vqa import Part, words_of
from crossattention.data.vocabulary import BEGIN, PAD, WordTokenizer
from crossattention.maps import attention_map
from crossattention.models.picture_reader import pixels
from crossattention.recipes.pictures import Prediction

CLS = "[CLS]"
"""How the position before the words is shown: BERT's name of the symbol that begins every text."""


@dataclass(frozen=True)
class QuestionBatch:
    """Questions with their pictures.

    Args:
        images: (z, H, W, 3) uint8.
        ids: (z, n) int64, BEGIN and the words; PAD beyond.
        answers: (z,) int64, places in the list of answers.
        indices: which questions these are.
    """

    images: Tensor
    ids: Tensor
    answers: Tensor
    indices: tuple[int, ...]

    @property
    def mask(self) -> Tensor:
        """Bool (z, n), True = BEGIN or a word."""
        return self.ids != PAD

    @property
    def num_tokens(self) -> int:
        """The positions that are real."""
        return int(self.mask.sum())

    def to(self, device: torch.device | str) -> QuestionBatch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "ids", "answers")}
        return replace(self, **moved)


class Questions:
    """The questions of a part as tensors.

    Args:
        part: pictures and questions.
        tokenizer: of the words.
        answers: all answers.
        seed: of the order of the batches.

    Raises:
        UnknownSymbol: a word that the tokenizer does not know.
    """

    def __init__(self, part: Part, tokenizer: WordTokenizer, answers: Sequence[str], *, seed: int = 0) -> None:
        self.part, self.seed = part, seed
        self.images = torch.from_numpy(part.images)
        self.ids = padded([encoded(tokenizer, question.text) for question in part.questions])
        place = {answer: index for index, answer in enumerate(answers)}
        self.answers = torch.tensor([place[question.answer] for question in part.questions])
        self.image_of = torch.tensor([question.image for question in part.questions])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> QuestionBatch:
        """Some of the questions, no longer than the longest of them."""
        chosen = torch.as_tensor(indices)
        ids = self.ids[chosen]
        width = int((ids != PAD).sum(1).max())
        return QuestionBatch(
            self.images[self.image_of[chosen]], ids[:, :width], self.answers[chosen], tuple(int(index) for index in indices)
        )

    def batch_at(self, step: int, batch_size: int) -> QuestionBatch:
        """The batch of a step, a pure function of (seed, step); each pass over the questions has an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        order = _order(self.seed, epoch, len(self))
        return self.batch(order[place * batch_size : (place + 1) * batch_size])

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches that hold every question once."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int) -> Iterator[QuestionBatch]:
        """All questions, in their order."""
        for begin in range(0, len(self), batch_size):
            yield self.batch(range(begin, min(begin + batch_size, len(self))))


@dataclass(frozen=True)
class Answerer:
    """A model with its vocabulary.

    Args:
        model: a `PictureReader`, in evaluation mode.
        tokenizer: of the words, the answers among them.
        answers: all answers.
    """

    model: Any
    tokenizer: WordTokenizer
    answers: tuple[str, ...]

    @property
    def choices(self) -> list[int]:
        """The answers as words of the vocabulary."""
        return [self.tokenizer.encode(answer)[0] for answer in self.answers]

    def encode(self, question: str) -> list[int]:
        """BEGIN and the words of a question.

        Raises:
            UnknownSymbol: a word that was never seen in training, named.
            ValueError: no word, or more than any question of the training had.
        """
        ids = encoded(self.tokenizer, question)
        longest = self.model.config.decoder.max_length - 1
        if len(ids) == 1:
            raise ValueError(f"expected a question, got one without a word: {question!r}")
        if len(ids) - 1 > longest:
            raise ValueError(
                f"expected a question of at most {longest} words, the longest that it was trained on, got {len(ids) - 1}"
            )
        return ids

    def check_picture(self, image: np.ndarray, name: str) -> np.ndarray:
        """Refuse a picture of another size than the model reads.

        Raises:
            ValueError: another size; it is not resized, as a patch would hold something else than in training.
        """
        height, width = self.model.config.height, self.model.config.width
        if image.shape[:2] != (height, width):
            raise ValueError(
                f"{name} is {image.shape[1]} x {image.shape[0]} pixels; this model reads pictures of {width} x {height}, the size "
                "it was trained on: scale or cut it to that size"
            )
        return image

    def predict(self, batch: QuestionBatch) -> Tensor:
        """The log-probability of each answer, (z, number of answers)."""
        batch = batch.to(next(self.model.parameters()).device)
        with torch.no_grad():
            return self.model.answer(pixels(batch.images), batch.ids, batch.mask, choices=self.choices).cpu()

    def ask(self, image: np.ndarray, question: str, *, num_hypotheses: int = 1) -> list[Prediction]:
        """The best answers to one question about one picture (H, W, 3); Raises as `encode`."""
        scores, places = self.predict(self.batch_of(image, question))[0].topk(num_hypotheses)
        found = zip(scores.tolist(), places.tolist(), strict=True)
        return [Prediction(self.answers[place], score, float(np.exp(score))) for score, place in found]

    def batch_of(self, image: np.ndarray, question: str) -> QuestionBatch:
        """One question about one picture."""
        ids = torch.tensor([self.encode(question)])
        return QuestionBatch(torch.tensor(image)[None], ids, torch.zeros(1, dtype=torch.int64), (0,))

    def maps(self, batch: QuestionBatch) -> Tensor:
        """What each position of the questions reads of the patches, (L, z, h, n, m), in every layer and head."""
        batch = batch.to(next(self.model.parameters()).device)
        seen: list[tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = []
        layers = [layer.cross_attention for layer in self.model.decoder.layers]
        hooks = [layer.register_forward_pre_hook(lambda *call: seen.append(call), with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                self.model(pixels(batch.images), batch.ids, batch.mask)
                return torch.stack([attention_map(layer, *args, **kwargs) for layer, args, kwargs in seen]).cpu()
        finally:
            for hook in hooks:
                hook.remove()


def answer_loss(model: nn.Module, batch: QuestionBatch, choices: Sequence[int]) -> Tensor:
    """The cross-entropy of the answer, which every position of the question shall give; the mean over all positions, in nats."""
    logits = model(pixels(batch.images), batch.ids, batch.mask)
    right = torch.tensor(choices, device=batch.answers.device)[batch.answers]
    labels = right[:, None].expand_as(batch.ids).masked_fill(~batch.mask, -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def encoded(tokenizer: WordTokenizer, question: str) -> list[int]:
    """BEGIN and the words of a question.

    Raises:
        UnknownSymbol: a word that the tokenizer does not know.
    """
    return [BEGIN, *tokenizer.encode(" ".join(words_of(question)))]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ids of several questions as one tensor, PAD beyond each end."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], dtype=torch.int64)


def patches_with_a_shape(images: Tensor, patch: int) -> Tensor:
    """Which patches hold something that is drawn: bool (z, m) of pictures (z, H, W, 3) on a plain background.

    A pixel is drawn where it differs from the background, which is the commonest colour of the picture's border.
    """
    colors = images.long() @ torch.tensor([65536, 256, 1])
    border = torch.cat([colors[:, 0], colors[:, -1], colors[:, :, 0], colors[:, :, -1]], dim=1)
    background = border.mode(dim=1).values
    drawn = colors != background[:, None, None]
    return F.max_pool2d(drawn.float().unsqueeze(1), patch).flatten(1) > 0


@dataclass(frozen=True, eq=False)
class Reading:
    """How much of the words' attention falls on patches that hold the shape; shares of 1, a mean over words, then questions.

    Args:
        mean: of all layers and heads together, which is what the view shows first.
        heads: (L, h), of each head of each layer.
        even: what attention spread evenly over the picture would give: the share of the patches that hold the shape.
    """

    mean: float
    heads: np.ndarray
    even: float


def reading_of(answerer: Answerer, batches: Iterable[QuestionBatch]) -> Reading:
    """Measure what the words of questions read; the position before them, [CLS], is left out.

    Raises:
        ValueError: no questions.
    """
    on_shape, even, count = torch.zeros(()), 0.0, 0
    for batch in batches:
        shape = patches_with_a_shape(batch.images, answerer.model.config.patch).float()
        mass = torch.einsum("lzhnm,zm->lzhn", answerer.maps(batch), shape)
        words = batch.mask.clone()
        words[:, 0] = False
        of_question = (mass * words[None, :, None]).sum(-1) / words.sum(-1)[None, :, None]
        on_shape = on_shape + of_question.sum(1)
        even += float(shape.mean(1).sum())
        count += len(batch.ids)
    if not count:
        raise ValueError("expected questions to measure what their words read, got none")
    heads = (on_shape / count).numpy()
    return Reading(float(heads.mean()), heads, even / count)


def reading_together(counts: Mapping[Reading, int]) -> Reading:
    """What is read in several sets of questions together.

    Args:
        counts: what is read in each set, and how many questions it has.
    """
    total = sum(counts.values())
    heads = sum(read.heads * (count / total) for read, count in counts.items())
    return Reading(float(np.mean(heads)), np.asarray(heads), sum(read.even * (count / total) for read, count in counts.items()))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
